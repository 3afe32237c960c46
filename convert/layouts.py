"""Which widths a matrix may be stored in: exllamav2's option tables, and layouts cut to the data. Knows no weights.

A layout is ((bits, rows), ...) per group in stored order (formats/exl2.md 2.1): stored rows are sorted by importance,
widths never rise, every group is a multiple of 32 rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exl_runtime.errors import ConvertError

from .encoded import Layout


@dataclass(frozen=True, slots=True)
class Option:
    """exllamav2's description of a layout ("QParams", formats/exl2.md 6.1).

    bits         widths, falling
    shares       part of the rows of each width; they add up to 1
    group_sizes  rows of a group of each width
    """

    bits: tuple[int, ...]
    shares: tuple[float, ...]
    group_sizes: tuple[int, ...]

    def layout(self, inputs: int) -> Layout:
        """The layout of a matrix of `inputs` rows: counts rounded up, the last group cut to what is left."""
        left, groups = inputs, []
        for bits, share, size in zip(self.bits, self.shares, self.group_sizes, strict=True):
            count = math.ceil(min(inputs * share, left) / size)
            for _ in range(count):
                rows = min(size, left)
                if rows > 0:
                    groups.append((bits, rows))
                    left -= rows
        return tuple(groups)


def option(widths: str, shares: str = "1", sizes: str = "128") -> Option:
    """ "4/3", ".1", "64": 4 bits for a tenth of the rows, 3 for the rest, groups of 64; "8": groups of 128.

    shares of all widths but the last, which gets the rest; sizes: one for all widths, or one for each.
    """
    bits = tuple(int(b) for b in widths.split("/"))
    given = [float(share) for share in shares.split("/")][: len(bits) - 1]
    groups = tuple(int(size) for size in sizes.split("/"))
    return Option(bits, (*given, 1.0 - sum(given)), groups * len(bits) if len(groups) == 1 else groups)


def _attention(*rows: tuple[Option, ...]) -> tuple[dict[str, Option], ...]:
    keys = ("q_proj", "k_proj", "v_proj", "o_proj")
    return tuple(dict(zip(keys, row, strict=True)) for row in rows)


def _mlp(*rows: tuple[Option, ...]) -> tuple[dict[str, Option], ...]:
    keys = ("gate_proj", "up_proj", "down_proj")
    return tuple(dict(zip(keys, row, strict=True)) for row in rows)


_A = option("3/2", ".1", "64")
_B = option("4/3", ".1", "128")
_D = option("6/3/2", ".05/.2", "32/64/64")

# formats/exl2.md 6.1: what exllamav2 chooses from, one row per attention block (q, k, v, o) ...
CLASSIC_ATTENTION = _attention(
    (option("3/2", ".05", "64"),) * 4,
    (_A, _A, option("3/2", ".25", "64"), _A),
    (_A, _A, _B, _A),
    (_A, _A, _B, _B),
    (_B,) * 4,
    (_B, _B, option("4/3", ".1", "64"), _B),
    (option("4"),) * 4,
    (option("4"), option("4"), option("4", "1", "64"), option("4")),
    (*(option("4", "1", "64"),) * 2, option("4", "1", "32"), option("4", "1", "64")),
    (option("4", "1", "32"),) * 4,
    (*(option("5/4", ".1", "128"),) * 2, option("5/4", ".1", "64"), option("5/4", ".1", "128")),
    (*(option("5/4", ".1", "64"),) * 2, option("5/4", ".1", "32"), option("5/4", ".1", "64")),
    (*(option("5/4", ".1", "64"),) * 2, option("5", "1", "64"), option("5/4", ".1", "64")),
    (*(option("5/4", ".1", "32"),) * 2, option("5", "1", "32"), option("5/4", ".1", "32")),
    (*(option("6/5", ".1", "128"),) * 2, option("6"), option("6/5", ".1", "128")),
    (*(option("6/5", ".1", "32"),) * 2, option("6", "1", "32"), option("6/5", ".1", "32")),
    (option("6"),) * 4,
    (*(option("6", "1", "32"),) * 2, option("8", "1", "32"), option("6", "1", "32")),
    (option("8"),) * 4,
)
# ... and one row per MLP (gate, up, down).
CLASSIC_MLP = _mlp(
    (option("3/2", ".05", "64"), option("3/2", ".05", "64"), _D),
    (_A, option("3/2", ".25", "64"), _D),
    (_A, option("3/2", ".3", "64"), option("5/3", ".05", "32")),
    (_A, option("3/2", ".3", "64"), option("5/4", ".05", "32")),
    (_B, option("4/3", ".25", "128"), option("8/4/3", ".05/.1", "32/128/128")),
    (option("4/3", ".1", "32"), option("4/3", ".25", "32"), option("8/4/3", ".05/.1", "32")),
    (option("4/3", ".1", "32"), option("4/3", ".25", "32"), option("8/4", ".05", "32/128")),
    (option("4"), option("4", "1", "32"), option("8/4", ".05", "32/128")),
    (option("4", "1", "32"), option("4", "1", "32"), option("8/4", ".05", "32")),
    (option("5/4", ".1", "128"), option("5/4", ".25", "128"), option("8/5/4", ".05/.1", "32/128/128")),
    (option("5/4", ".1", "32"), option("5/4", ".25", "32"), option("8/5/4", ".05/.1", "32")),
    (option("6/5", ".1", "128"), option("6/5", ".25", "128"), option("8/6/5", ".05/.1", "32/128/128")),
    (option("6/5", ".1", "32"), option("6/5", ".25", "32"), option("8/6/5", ".05/.1", "32")),
    (option("6"), option("6"), option("8/6", ".05", "32/128")),
    (option("8/6", ".1", "128"), option("8/6", ".1", "128"), option("8/6", ".15", "128")),
    (option("8/6", ".1", "128"), option("8/6", ".1", "128"), option("8")),
    (option("8"), option("8"), option("8")),
)
HEAD: dict[int, Option] = {
    2: option("4/2", ".3", "32"),
    3: option("4/3", ".15", "32"),
    4: option("6/4", ".15", "32"),
    5: option("6/5", ".15", "128"),
    6: option("8/6", ".15", "128"),
    8: option("8", "1", "128"),
}
HEAD_BITS = tuple(HEAD)


def grouped(widths: Sequence[tuple[int, int]], size: int) -> Layout:
    """Runs of (bits, rows), widths falling, cut into groups of at most `size` rows.

    What is left of a run is a shorter group of its own: exllamav2 reads any multiple of 32 rows.
    """
    groups: list[tuple[int, int]] = []
    for bits, rows in widths:
        while rows > 0:
            groups.append((bits, min(size, rows)))
            rows -= min(size, rows)
    return tuple(groups)


def uniform(inputs: int, bits: int, size: int) -> Layout:
    """One width in groups of `size` rows, the last one shorter."""
    return grouped(((bits, inputs),), size)


def describe(layout: Layout) -> str:
    """ "0.125:5b_64g/0.875:4b_64g": share of the rows, bits and largest group of every width."""
    total = sum(rows for _, rows in layout)
    parts = []
    for bits in dict.fromkeys(bits for bits, _ in layout):
        rows = [rows for width, rows in layout if width == bits]
        parts.append(f"{sum(rows) / total:.3g}:{bits}b_{max(rows)}g")
    return "/".join(parts)


def head_option(bits: int) -> Option:
    """exllamav2's layout for `--head-bits`. Raises ConvertError for a number that is none of its settings."""
    if bits not in HEAD:
        raise ConvertError(f"--head-bits {bits}: not a setting of the format", hint=f"use one of {HEAD_BITS}")
    return HEAD[bits]
