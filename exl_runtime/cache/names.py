"""How users name the types of keys and values: "fp16", "q8", "k6v4". Text and numbers only; imports nothing heavy."""

import re

from ..errors import UsageError

FLOATS = ("fp32", "fp16", "bf16")
SHORT = {"q8": (8, 8), "q6": (6, 6), "q4": (4, 4)}  # bits of a key value, bits of a value value
CHOICES = "fp32, fp16, bf16, q8, q6, q4, or kXvY with 2 to 8 bits each, as in k6v4"


def check_name(name: str) -> str:
    """The one spelling of a type's name (k8v8 is q8). Raises UsageError when there is no such type."""
    bits = bits_of_name(name)
    return name if bits is None else name_of_bits(*bits)


def bits_of_name(name: str) -> tuple[int, int] | None:
    """Bits of keys and of values; None for the types that are not quantized. Raises UsageError."""
    if name in FLOATS:
        return None
    if name in SHORT:
        return SHORT[name]
    found = re.fullmatch(r"k([2-8])v([2-8])", name)
    if found is None:
        raise UsageError(f"unknown cache type {name!r}", hint=f"use auto, {CHOICES}")
    return int(found[1]), int(found[2])


def name_of_bits(key_bits: int, value_bits: int) -> str:
    """The inverse of `bits_of_name`."""
    return next((name for name, bits in SHORT.items() if bits == (key_bits, value_bits)), f"k{key_bits}v{value_bits}")
