"""Medians with their range. Knows nothing of what was measured."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Of `count` values: their median (of an even number: the mean of the middle two), the least and the greatest."""

    median: float
    low: float
    high: float
    count: int

    def text(self) -> str:
        """ "41.3 (39.8 to 42.0)", three digits that count; one value stands alone."""
        if self.count == 1:
            return short(self.median)
        return f"{short(self.median)} ({short(self.low)} to {short(self.high)})"

    def facts(self) -> dict[str, float]:
        """For JSON."""
        return {"median": self.median, "min": self.low, "max": self.high, "runs": self.count}


def spread(values: Iterable[float]) -> Spread:
    """Raises ValueError without values, or where one is not a finite number."""
    found = list(values)
    if not all(math.isfinite(value) for value in found):
        raise ValueError(f"not all finite: {found}")
    if not found:
        raise ValueError("no values")
    return Spread(statistics.median(found), min(found), max(found), len(found))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """Of run i to run i: what drifts from run to run cancels. Runs that only one of them finished do not count."""
    pairs = [mine / other for mine, other in zip(ours, theirs, strict=False) if other > 0]
    return spread(pairs) if pairs else None


def short(value: float) -> str:
    """Three digits that count, never an exponent: 0.0123, 1.23, 12.3, 123, 1234."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"
