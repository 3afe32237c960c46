"""The last step: one token from a row of logits, and log-probabilities for those who ask. Knows no parameters."""

from dataclasses import dataclass

import numpy as np

from ..ops.sample import FLOOR
from .transforms import REMOVED, Logits, kth_largest, weights

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token.

    `logprob` and `top` (pairs of id and log-probability, best first) are of the model's own distribution, before any
    transform, in natural logarithms; None and () when not asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def greedy(x: Logits) -> int:
    """The index of the largest logit, the lowest among equals."""
    return int(x.argmax())


def inverse_cdf(x: Logits, u: float) -> int:
    """The token at quantile u, 0 <= u < 1, of softmax(x), tokens in index order.

    That is the first i whose running sum of weights exceeds u times their total, in float64. Tokens less likely than
    1e-18 times the best are never drawn, as in `ops.sample.sample_min_p`, of which this is the general form.
    """
    w = weights(x)
    w[w < FLOOR] = 0.0
    # Sums of blocks first: a running sum over a whole vocabulary is the slowest thing a processor can do with it.
    sums = np.add.reduceat(w, np.arange(0, w.size, _BLOCK))
    running = np.cumsum(sums)
    target = u * running[-1]
    block = int(np.searchsorted(running, target, side="right"))
    if block == running.size:  # u * total was rounded up to total
        block = int(np.flatnonzero(sums)[-1])
    before = running[block - 1] if block else 0.0
    inner = w[block * _BLOCK : (block + 1) * _BLOCK]
    place = int(np.searchsorted(np.cumsum(inner), target - before, side="right"))
    if place == inner.size:  # the two ways of summing a block differ in the last bit
        place = int(np.flatnonzero(inner)[-1])
    return block * _BLOCK + place


def with_logprobs(token: int, raw: Logits, count: int) -> Draw:
    """The Draw of `token`, with its log-probability under softmax(raw) and those of the `count` best.

    Among equals the lowest ids come first.
    """
    top = float(raw.max())
    log_total = top + float(np.log(weights(raw).sum()))
    count = min(count, raw.size)
    ids = np.flatnonzero((raw >= kth_largest(raw, count)) & (raw > REMOVED))
    ids = ids[np.argsort(-raw[ids], kind="stable")][:count]
    best = tuple((int(i), float(raw[i]) - log_total) for i in ids)
    return Draw(token, float(raw[token]) - log_total, best)
