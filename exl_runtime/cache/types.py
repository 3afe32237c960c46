"""`CacheType`: how one key or value is held. Knows sizes; what quantized bytes mean is said by `ops.kv_quant`."""

from dataclasses import dataclass

import torch

from ..ops.kv_quant import BITS, row_bytes
from .names import FLOATS, bits_of_name, check_name


@dataclass(frozen=True, slots=True)
class CacheType:
    """Keys and values as elements of `dtype`, or as rows of codes.

    name                 what users call it; see `names`
    dtype                of the tensors behind the pages: torch.float32 | float16 | bfloat16, or uint8 for codes
    key_bits/value_bits  widths of the codes, 2 to 8; both 0: not quantized
    """

    name: str
    dtype: torch.dtype
    key_bits: int = 0
    value_bits: int = 0

    def __post_init__(self) -> None:
        widths = (self.key_bits, self.value_bits)
        if self.dtype == torch.uint8:
            assert all(bits in BITS for bits in widths), widths
        else:
            assert widths == (0, 0), widths

    @property
    def quantized(self) -> bool:
        return self.dtype == torch.uint8

    def row_lengths(self, head_dim: int) -> tuple[int, int]:
        """Elements of `dtype` that one head of keys takes, and one of values."""
        if not self.quantized:
            return head_dim, head_dim
        return row_bytes(head_dim, self.key_bits), row_bytes(head_dim, self.value_bits)


FP32, FP16, BF16 = (
    CacheType(name, dtype) for name, dtype in zip(FLOATS, (torch.float32, torch.float16, torch.bfloat16), strict=True)
)


def cache_type(name: str) -> CacheType:
    """The type that users call `name`. Raises UsageError for an unknown one."""
    bits = bits_of_name(name)
    if bits is not None:
        return CacheType(check_name(name), torch.uint8, *bits)
    return next(known for known in (FP32, FP16, BF16) if known.name == name)
