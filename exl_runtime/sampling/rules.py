"""Declares and checks single parameters: type, range, and the words of the refusal.

Knows nothing of what a parameter does.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from ..errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Allowed values of a number. `above` excludes `low` itself; `also` lists further values that are fine."""

    whole: bool
    low: float
    high: float
    above: bool
    also: tuple[float, ...]
    hint: str | None

    def describe(self) -> str:
        """The allowed values in words."""
        start = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        span = f"{self.low:g} to {self.high:g}" if not self.above else f"above {self.low:g}, up to {self.high:g}"
        words = start if math.isinf(self.high) else span
        if self.high == 2**64 - 1:
            words = "0 to 2^64 - 1"
        return words + "".join(f", or {value:g}" for value in self.also) + (" (whole numbers)" if self.whole else "")

    def check(self, name: str, value: object) -> float:
        """The value as int or float; UsageError when it is of another type, NaN, or out of range."""
        wanted = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, wanted):
            kind = "a whole number" if self.whole else "a number"
            raise UsageError(f"{name} must be {kind}, got {value!r}", hint=f"allowed: {self.describe()}")
        try:
            number: float = int(value) if self.whole else float(value)
        except OverflowError:  # an integer beyond every float
            number = math.inf if value > 0 else -math.inf
        inside = self.low < number <= self.high if self.above else self.low <= number <= self.high
        if not inside and number not in self.also:  # NaN fails every comparison
            raise UsageError(f"{name} is {value!s:.40}, allowed: {self.describe()}", hint=self.hint)
        return number


def real(
    default: float,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    also: tuple[float, ...] = (),
    hint: str | None = None,
) -> Any:
    """A dataclass field that holds a float from `low` to `high`."""
    rule = Rule(whole=False, low=low, high=high, above=above, also=also, hint=hint)
    return field(default=default, metadata={"rule": rule})


def whole(
    default: int | None, low: int, high: float = math.inf, *, optional: bool = False, hint: str | None = None
) -> Any:
    """A dataclass field that holds an int from `low` to `high`; with `optional`, None too."""
    rule = Rule(whole=True, low=low, high=high, above=False, also=(), hint=hint)
    return field(default=default, metadata={"rule": rule, "optional": optional})


def check_flag(name: str, value: object) -> bool:
    """True or False; UsageError for anything else (1 and "yes" are likely mistakes)."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, got {value!r}")
    return value


def check_ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids, sorted, each once; UsageError when an element is no whole number >= 0."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise UsageError(f"{name} must be a list of token ids, got {value!r}")
    return tuple(sorted({check_id(name, element) for element in value}))


def check_id(name: str, value: object) -> int:
    """One token id; UsageError when it is no whole number >= 0. The Sampler checks the upper end."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise UsageError(f"{name}: {value!r} is not a token id", hint="token ids are whole numbers from 0")
    return int(value)


def check_strings(name: str, value: object) -> tuple[str, ...]:
    """Non-empty strings in the given order; a bare string is refused, because its letters are rarely meant."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise UsageError(f"{name} must be a list of strings, got {value!r}")
    texts = tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise UsageError(f"{name}: {text!r} is not a non-empty string")
    return texts


def check_bias(name: str, value: object) -> dict[int, float]:
    """Token id -> number added to its logit; -inf bans. JSON spells the ids as strings, which is understood."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} must map token ids to numbers, got {value!r}")
    checked = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        known = isinstance(bias, Real) and not isinstance(bias, bool)
        # -inf bans; other numbers have to be ones a float can hold (NaN fails every comparison)
        if not known or not (bias == -math.inf or -1e38 <= bias <= 1e6):
            raise UsageError(
                f"{name}: the bias of token {key!r} is {bias!r:.60}, allowed: numbers up to 1e6, -inf to ban",
                hint="to force a token use allowed_tokens",
            )
        checked[check_id(name, token)] = float(bias)
    return checked
