"""Transforms that need the ranking of the tokens: top-k, top-p, typical, tail-free, skew.

Same contract as `transforms.py`, but these take sets of an exact size: among equal tokens the lowest ids are taken
first. Whole-vocabulary sorts are avoided where the answer allows it.
"""

import numpy as np
from numpy.typing import NDArray

from .transforms import REMOVED, Logits, kth_largest, probabilities, weights

_BINS = 1024
_WIDTH = 32.0
"""Nats from the best beyond which everything shares the last bin: e^-32 is rounding in any sum."""


def best(x: Logits, n: int) -> Logits:
    """Leaves exactly the n largest logits (all, if there are fewer)."""
    if n >= x.size:
        return x
    cut = kth_largest(x, n)
    if cut == REMOVED:
        return x
    stays = x > cut
    stays[np.flatnonzero(x == cut)[: n - np.count_nonzero(stays)]] = True
    return np.where(stays, x, REMOVED)


def ranking(x: Logits) -> NDArray[np.int64]:
    """Ids of the remaining tokens, the most likely first, among equals the lowest id.

    Sorts integers that hold logit and id at once: twice as fast as a stable indirect sort of the floats.
    """
    ids = np.flatnonzero(x > REMOVED)
    bits = (x[ids] + np.float32(0)).view(np.int32)  # + 0: the two zeros are equal
    descending = np.where(bits < 0, bits & 0x7FFFFFFF, ~bits).astype(np.int64)
    return np.sort(descending << 32 | ids) & 0xFFFFFFFF


def top_k(x: Logits, k: int, keep: int = 1) -> Logits:
    """Leaves the k most likely tokens, k >= 1. Exactly k: Hugging Face also keeps those that tie with the k-th."""
    return best(x, max(k, keep))


def _smallest_set(x: Logits, key: NDArray[np.floating], mass: NDArray[np.float64], need: float, keep: int) -> Logits:
    """Leaves the shortest run of tokens by ascending (key, id) whose mass sums to at least `need`, and at least `keep`.

    A histogram over the keys finds the bin in which the sum gets there; only that bin is sorted.
    """
    least = key.min()
    there = key < np.inf
    last_bin = np.float32(_BINS - 1)
    width = max(min(float(key[there].max() - least), _WIDTH), 1e-6)
    bins = np.minimum((key - least) * ((_BINS - 1) / width), last_bin).astype(np.int64)  # monotone in the key
    masses = np.cumsum(np.bincount(bins, weights=mass, minlength=_BINS))
    crossing = min(int(np.searchsorted(masses, need, side="left")), _BINS - 1)
    stays = bins < crossing
    ids = np.flatnonzero((bins == crossing) & there)
    ids = ids[np.argsort(key[ids], kind="stable")]
    missing = need - (masses[crossing - 1] if crossing else 0.0)
    stays[ids[: int(np.searchsorted(np.cumsum(mass[ids]), missing, side="left")) + 1]] = True
    if keep > 1 and np.count_nonzero(stays) < keep:
        stays = best(-key.astype(np.float32), keep) > REMOVED
    return np.where(stays, x, REMOVED)


def top_p(x: Logits, p: float, keep: int = 1) -> Logits:
    """Nucleus sampling: the smallest set of most likely tokens whose probabilities sum to at least p.

    Source: Holtzman et al. 2019, "The curious case of neural text degeneration".
    """
    if p >= 1:
        return x
    w = weights(x)
    return _smallest_set(x, -x, w, p * float(w.sum()), keep)


def typical(x: Logits, mass: float, keep: int = 1) -> Logits:
    """Locally typical sampling: tokens whose surprise is nearest to the entropy, until their sum reaches `mass`.

    Source: Meister et al. 2022; the set is that of Hugging Face's TypicalLogitsWarper. The most likely token may go.
    """
    if mass >= 1:
        return x
    w = weights(x)
    total = float(w.sum())
    there = w > 0
    surprise = np.full(x.shape, np.inf)
    surprise[there] = np.log(total) - np.subtract(x, x.max(), dtype=np.float64)[there]
    p = w / total
    entropy = float(np.sum(p[there] * surprise[there]))
    return _smallest_set(x, np.abs(surprise - entropy), p, mass, keep)


def tail_free(x: Logits, z: float, keep: int = 1) -> Logits:
    """Tail-free sampling: cuts where the curvature of the sorted probabilities has spent the share z of its sum.

    Source: Phenix and Egan 2019. Of the n sorted tokens the first always stays, and the (j+1)-th while the sum of the
    first j normalised |second differences| is <= z: the form of KoboldAI and text-generation-webui (llama.cpp's, since
    removed, kept one token less). Fewer than three tokens, or no curvature at all: nothing happens.
    """
    there = x[x > REMOVED]
    if z >= 1 or there.size < 3:
        return x
    p = probabilities(np.sort(there)[::-1])
    curvature = np.abs(np.diff(p, 2))
    total = float(curvature.sum())
    if total < 1e-12:  # a flat or straight line has no tail; what is left here is rounding
        return x
    spent = np.cumsum(curvature / total)
    return best(x, max(1 + int(np.count_nonzero(spent <= z)), keep))


def skew(x: Logits, amount: float) -> Logits:
    """Leans the draw to less likely tokens (amount > 0) or to likelier ones (< 0).

    exllamav2 raises its random number r to the power exp(-amount) and draws over descending probabilities. That is
    the same as drawing from q_i = C_i^a - C_(i-1)^a, a = exp(amount), C the cumulative sums in that order; written
    this way it is a transform of the distribution and any draw can follow.
    """
    ids = ranking(x)
    p = probabilities(x[ids])
    cumulative = np.minimum(np.cumsum(p), 1.0)
    cumulative[-1] = 1.0
    leaned = np.diff(cumulative ** np.exp(amount), prepend=0.0)
    changed = np.full_like(x, REMOVED)
    with np.errstate(divide="ignore"):
        changed[ids] = np.log(leaned)  # no mass left in float64: log 0 = -inf, removed
    return changed
