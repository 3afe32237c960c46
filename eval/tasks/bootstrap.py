"""Confidence intervals by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13). Knows numbers only.

What is drawn again, with replacement, is the task: a task with several samples stays together, because its samples are
not independent of each other. So the interval says how far a score would move with other tasks of the same kind; it
says nothing about another seed or another prompt. Few tasks make it too narrow, and where all tasks score alike it has
no width at all, which `degenerate` tells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 2**22  # indices drawn at once


@dataclass(frozen=True, slots=True)
class Interval:
    """Bounds of a score in its own unit. degenerate: all tasks scored alike, the bounds say nothing."""

    low: float
    high: float
    degenerate: bool = False


def of_mean(scores: Sequence[float], seed: int, *, resamples: int = RESAMPLES) -> Interval | None:
    """For the mean of `scores`, one per task; None for fewer than two."""
    n = len(scores)
    if n < 2:
        return None
    values = numpy.asarray(scores, dtype=numpy.float64)
    if values.min() == values.max():
        return Interval(float(values[0]), float(values[0]), degenerate=True)
    generator = numpy.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    means = [
        values[generator.integers(0, n, size=(min(rows, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return _percentiles(numpy.concatenate(means))


def of_statistic(statistic: Callable[[Sequence[int]], float], n: int, seed: int, *, resamples: int) -> Interval | None:
    """For what cannot be averaged over tasks: `statistic` gets the indices of the drawn tasks, 0 to n - 1."""
    if n < 2:
        return None
    generator = numpy.random.default_rng(seed)
    values = numpy.asarray([statistic(generator.integers(0, n, size=n).tolist()) for _ in range(resamples)])
    if values.min() == values.max():
        return Interval(float(values[0]), float(values[0]), degenerate=True)
    return _percentiles(values)


def _percentiles(values: numpy.ndarray) -> Interval:
    low, high = numpy.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
