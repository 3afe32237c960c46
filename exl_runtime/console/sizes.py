"""Sizes of memory as people write them. Knows no devices."""

import re
from decimal import Decimal

from ..errors import UsageError
from .progress import printable

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE | re.ASCII)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of "12GB", "11.5 GiB", "11.5G", "8000MB". Raises UsageError.

    KB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB, and K, M, G, T alone, powers of 1024, as memory is sold.
    """
    match = _SIZE.fullmatch(text)
    if match is None or not match[2] or (match[3] and not match[4]):
        raise UsageError(
            f"{printable(repr(text), 60)} is not a size", hint="12GB (10^9 bytes), 12GiB or 12G (2^30 bytes), 8000MB"
        )
    base = 1000 if match[4] and not match[3] else 1024
    return int(Decimal(match[1]) * base ** _POWERS[match[2].lower()])


def size_text(nbytes: int, like: int | None = None) -> str:
    """ "12.00 GB", or "12.00 GiB" where `like` (default: the size itself) is a whole number of MiB; GB and up to MB."""
    unit, letter = (1024, "i") if (nbytes if like is None else like) % 2**20 == 0 else (1000, "")
    if abs(nbytes) >= unit**3:
        return f"{nbytes / unit**3:.2f} G{letter}B"
    return f"{nbytes / unit**2:.1f} M{letter}B"
