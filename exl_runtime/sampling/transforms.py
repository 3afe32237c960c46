"""Transforms of one row of logits that look at values only: temperatures, and cuts at a threshold.

Every function takes float32 logits (n,) in which -inf means removed, and returns logits of the same shape, float32;
the input is never edited (it may be returned when there is nothing to do). At least one token must be left on entry,
and at least one is left on return. `keep` is the number of tokens a cut leaves standing at least: when fewer pass the
threshold it is lowered to the `keep`-th best logit, and tokens that tie with that one stay too (a threshold never
separates equals). Knows no history, no ids, no parameters.
"""

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

REMOVED = np.float32(-np.inf)
_BLOCK = 128


def weights(x: Logits) -> NDArray[np.float64]:
    """exp(x - max) in float64: the distribution before it is normalised; removed tokens weigh 0."""
    shifted: NDArray[np.float64] = np.subtract(x, x.max(), dtype=np.float64)
    return np.exp(shifted, out=shifted)


def probabilities(x: Logits) -> NDArray[np.float64]:
    """softmax in float64."""
    w = weights(x)
    w /= w.sum()
    return w


def kth_largest(x: Logits, k: int) -> np.float32:
    """The k-th largest value, 1 <= k <= n."""
    blocks = x.size // _BLOCK
    if 4 * k < blocks:
        # At least k blocks have a maximum >= the k-th largest block maximum, so this many values reach it: the answer
        # is among them. Spares a selection over the whole vocabulary.
        tops = x[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        x = x[x >= np.partition(tops, blocks - k)[blocks - k]]
    return np.partition(x, x.size - k)[x.size - k]


def temperature(x: Logits, t: float) -> Logits:
    """x / t, t > 0."""
    return x / np.float32(t)


def dynamic_temperature(x: Logits, low: float, high: float, exponent: float) -> Logits:
    """Temperature low + (high - low) * (H / H_max) ^ exponent.

    H is the entropy of the remaining tokens and H_max = ln(their number), as in llama.cpp and text-generation-webui.
    Never below 0.001, where the draw is greedy in all but name. One token left: nothing to do.
    """
    p = probabilities(x)
    p = p[p > 0]
    left = np.count_nonzero(x > REMOVED)
    if left < 2:
        return x
    share = min(max(-float(np.sum(p * np.log(p))) / np.log(left), 0.0), 1.0)
    return temperature(x, max(low + (high - low) * share**exponent, 1e-3))


def smoothing(x: Logits, factor: float, curve: float) -> Logits:
    """Quadratic smoothing with the cubic term of text-generation-webui (d = x - max <= 0):

    max - (3 - curve)/2 * factor * d^2 + (curve - 1)/2 * factor * d^3

    Curve 1 is the pure quadratic, which is what exllamav2 has. It comes after the temperature, not instead of it.
    """
    best = x.max()
    gone = x == REMOVED
    d = np.where(gone, np.float32(0), x - best).astype(np.float64)
    smooth = d * d * (factor * ((curve - 1) / 2 * d - (3 - curve) / 2)) + best
    with np.errstate(over="ignore"):
        return np.where(gone, REMOVED, smooth.astype(np.float32))


def _cut(x: Logits, limit: float, keep: int) -> Logits:
    """Removes logits below `limit`, but leaves `keep`."""
    bound = np.float32(limit)
    passed = x >= bound
    if keep > 1 or bound > x.max():
        left = int(np.count_nonzero(passed))
        if left < keep:
            passed = x >= kth_largest(x, min(keep, x.size))
    return np.where(passed, x, REMOVED)


def min_p(x: Logits, p: float, keep: int = 1) -> Logits:
    """Removes tokens less likely than p times the most likely one, 0 < p <= 1.

    Source: Nguyen et al. 2024, "Turning up the heat: min-p sampling".
    """
    return _cut(x, float(x.max()) + np.log(p), keep)


def top_a(x: Logits, a: float, keep: int = 1) -> Logits:
    """Removes tokens less likely than a * p_max^2 (BlinkDL's top-a, as in KoboldAI), 0 < a <= 1."""
    return _cut(x, float(x.max()) + np.log(a) - np.log(weights(x).sum()), keep)


def epsilon_cutoff(x: Logits, epsilon: float, keep: int = 1) -> Logits:
    """Removes tokens less likely than epsilon, 0 < epsilon <= 1.

    Source: Hewitt et al. 2022, "Truncation sampling as language model desmoothing".
    """
    return _cut(x, float(x.max()) + np.log(epsilon) + np.log(weights(x).sum()), keep)


def eta_cutoff(x: Logits, epsilon: float, keep: int = 1) -> Logits:
    """Removes tokens less likely than min(epsilon, sqrt(epsilon) * exp(-H)), H the entropy in nats.

    Source: the same paper, in the form of Hugging Face's EtaLogitsWarper.
    """
    w = weights(x)
    total = w.sum()
    p = w[w > 0] / total
    entropy = -float(np.sum(p * np.log(p)))
    log_eta = min(np.log(epsilon), 0.5 * np.log(epsilon) - entropy)
    return _cut(x, float(x.max()) + log_eta + np.log(total), keep)


def top_n_sigma(x: Logits, n: float, keep: int = 1) -> Logits:
    """Removes logits more than n standard deviations below the largest (Tang et al. 2024, "Top-n-sigma").

    The deviation is over the tokens still there and divides by their number, as in llama.cpp; the paper's code divides
    by one less, which no vocabulary can tell. The cut does not depend on the temperature, whether it ran or not.
    """
    there = x[x > REMOVED].astype(np.float64)
    return _cut(x, float(there.max()) - n * float(there.std()), keep)


def xtc(x: Logits, threshold: float, keep: int = 1, exempt: NDArray[np.bool_] | None = None) -> Logits:
    """Exclude top choices: of the tokens with probability >= threshold, all but the least likely are removed.

    Source: p-e-w's proposal for text-generation-webui (pull request 6335). Fewer than two such tokens: nothing
    happens. Where peers differ: exactly one token stays, the lowest id among equally unlikely ones (mlx-lm keeps all
    of those); `exempt` tokens (bool (n,)) are not removed and do not count as the one that stays (the webui gives up
    when one is hit, mlx-lm counts them); nothing happens either when fewer than `keep` tokens would be left, as in
    llama.cpp. The coin of `xtc_probability` is tossed by the caller.
    """
    likely = probabilities(x) >= threshold
    if exempt is not None:
        likely &= ~exempt
    ids = np.flatnonzero(likely)
    if ids.size < 2 or np.count_nonzero(x > REMOVED) - (ids.size - 1) < keep:
        return x
    stays = ids[np.argmin(x[ids])]
    changed = x.copy()
    changed[ids] = REMOVED
    changed[stays] = x[stays]
    return changed
