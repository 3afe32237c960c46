"""The samplers once more, in plain Python and float64, straight from their definitions: the oracle of these tests.

Rows are lists of floats, -inf is "removed". A filter returns the ids that stay, and how near the nearest decision was:
where that is below what float32 resolves, the outcome is a matter of rounding and nothing can be proved.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

INF = math.inf
Row = Sequence[float]
Filter = Callable[[Row], tuple[set[int], float]]


def softmax(x: Row) -> list[float]:
    top = max(x)
    w = [math.exp(v - top) if v > -INF else 0.0 for v in x]
    total = math.fsum(w)
    return [v / total for v in w]


def entropy(p: Sequence[float]) -> float:
    return -math.fsum(v * math.log(v) for v in p if v > 0)


def best_first(x: Row) -> list[int]:
    return sorted((i for i in range(len(x)) if x[i] > -INF), key=lambda i: (-x[i], i))


def _threshold(x: Row, limit: float, keep: int) -> tuple[set[int], float]:
    """Probabilities of at least `limit`, or of at least the keep-th best."""
    p = softmax(x)
    ranked = best_first(x)
    floor = x[ranked[min(keep, len(ranked)) - 1]]
    stays = {i for i in ranked if p[i] >= limit or x[i] >= floor}
    return stays, min(abs(math.log(p[i] / limit)) for i in ranked) if limit > 0 else INF


def _prefix(ranked: list[int], mass: Sequence[float], need: float, keep: int) -> tuple[set[int], float]:
    total, count, margin = 0.0, 0, INF
    for i in ranked:
        total += mass[i]
        count += 1
        margin = min(margin, abs(total - need))
        if total >= need and count >= keep:
            break
    return set(ranked[:count]), margin


def top_k(x: Row, k: int, keep: int = 1) -> tuple[set[int], float]:
    return set(best_first(x)[: max(k, keep)]), INF


def top_p(x: Row, mass: float, keep: int = 1) -> tuple[set[int], float]:
    return _prefix(best_first(x), softmax(x), mass, keep)


def min_p(x: Row, share: float, keep: int = 1) -> tuple[set[int], float]:
    return _threshold(x, share * max(softmax(x)), keep)


def top_a(x: Row, a: float, keep: int = 1) -> tuple[set[int], float]:
    return _threshold(x, a * max(softmax(x)) ** 2, keep)


def epsilon_cutoff(x: Row, epsilon: float, keep: int = 1) -> tuple[set[int], float]:
    return _threshold(x, epsilon, keep)


def eta_cutoff(x: Row, epsilon: float, keep: int = 1) -> tuple[set[int], float]:
    return _threshold(x, min(epsilon, math.sqrt(epsilon) * math.exp(-entropy(softmax(x)))), keep)


def top_n_sigma(x: Row, n: float, keep: int = 1) -> tuple[set[int], float]:
    ranked = best_first(x)
    mean = math.fsum(x[i] for i in ranked) / len(ranked)
    sigma = math.sqrt(math.fsum((x[i] - mean) ** 2 for i in ranked) / len(ranked))
    limit = max(x) - n * sigma
    floor = x[ranked[min(keep, len(ranked)) - 1]]
    return {i for i in ranked if x[i] >= limit or x[i] >= floor}, min(abs(x[i] - limit) for i in ranked)


def typical(x: Row, mass: float, keep: int = 1) -> tuple[set[int], float]:
    p = softmax(x)
    h = entropy(p)
    ranked = best_first(x)
    score = {i: abs(-math.log(p[i]) - h) for i in ranked}
    by_score = sorted(ranked, key=lambda i: (score[i], i))
    stays, margin = _prefix(by_score, p, mass, keep)
    # Different logits on the two sides of the entropy may be equally typical but for rounding.
    gaps = [abs(score[a] - score[b]) for a, b in pairwise(by_score) if x[a] != x[b]]
    return stays, min([margin, *gaps])


def tail_free(x: Row, z: float, keep: int = 1) -> tuple[set[int], float]:
    p = softmax(x)
    ranked = best_first(x)
    if len(ranked) < 3:
        return set(ranked), INF
    values = [p[i] for i in ranked]
    slopes = [b - a for a, b in pairwise(values)]
    bends = [abs(b - a) for a, b in pairwise(slopes)]
    if math.fsum(bends) < 1e-12:
        return set(ranked), abs(math.fsum(bends) - 1e-12) * 1e9
    total, count, margin = 0.0, 1, INF
    for bend in bends:
        total += bend / math.fsum(bends)
        margin = min(margin, abs(total - z))
        if total > z:
            break
        count += 1
    return set(ranked[: max(count, keep)]), margin


def xtc(x: Row, threshold: float, keep: int = 1, exempt: Sequence[int] = ()) -> tuple[set[int], float]:
    p = softmax(x)
    ranked = best_first(x)
    likely = [i for i in ranked if p[i] >= threshold and i not in exempt]
    margin = min(abs(math.log(p[i] / threshold)) for i in ranked if p[i] > 0)
    if len(likely) < 2 or len(ranked) - len(likely) + 1 < keep:
        return set(ranked), margin
    stays = min(likely, key=lambda i: (x[i], i))
    return set(ranked) - set(likely) | {stays}, margin


def skewed(x: Row, amount: float) -> list[float]:
    p = softmax(x)
    q = [0.0] * len(x)
    running = before = 0.0
    for i in best_first(x):
        running = min(running + p[i], 1.0)
        q[i] = running ** math.exp(amount) - before ** math.exp(amount)
        before = running
    return q


def dynamic_temperature(x: Row, low: float, high: float, exponent: float) -> list[float]:
    left = len(best_first(x))
    if left < 2:
        return list(x)
    t = low + (high - low) * (entropy(softmax(x)) / math.log(left)) ** exponent
    return [v / max(t, 1e-3) for v in x]


def smoothing(x: Row, factor: float, curve: float) -> list[float]:
    top = max(x)
    k, s = (3 - curve) / 2, (curve - 1) / 2
    return [-INF if v == -INF else top - k * factor * (v - top) ** 2 + s * factor * (v - top) ** 3 for v in x]


def kept(x: Row, stays: set[int]) -> list[float]:
    return [v if i in stays else -INF for i, v in enumerate(x)]


def invert(p: Sequence[float], u: float) -> int:
    """The first i whose running sum exceeds u times the total."""
    total = math.fsum(p)
    running = 0.0
    for i, v in enumerate(p):
        running += v
        if running > u * total:
            return i
    return max(i for i, v in enumerate(p) if v > 0)


def dry_lengths(history: Sequence[int], allowed: int, longest: int, breakers: Sequence[int] = ()) -> dict[int, int]:
    """For every token the length of the longest repetition it would continue, where that counts; by trying them all."""
    found: dict[int, int] = {}
    n = len(history)
    for end in range(1, n):  # history[end] is the token that followed then
        length = 0
        while (
            length < longest
            and end - 1 - length >= 0
            and history[end - 1 - length] == history[n - 1 - length]
            and history[n - 1 - length] not in breakers
        ):
            length += 1
        token = history[end]
        if length >= max(allowed, 1) and token not in breakers:
            found[token] = max(found.get(token, 0), length)
    return found


def assert_frequencies(counts: Sequence[int], p: Sequence[float]) -> None:
    """Pearson's chi-square test, at about one false alarm in 10^5; tokens of probability 0 must not occur at all."""
    draws = sum(counts)
    statistic, cells = 0.0, 0
    rare_seen = rare_expected = 0.0
    for seen, share in zip(counts, p, strict=True):
        assert share > 0 or seen == 0
        if share * draws < 5:  # too rare for the test by itself
            rare_seen += seen
            rare_expected += share * draws
            continue
        statistic += (seen - share * draws) ** 2 / (share * draws)
        cells += 1
    if rare_expected >= 5:
        statistic += (rare_seen - rare_expected) ** 2 / rare_expected
        cells += 1
    else:
        assert rare_seen <= 25
    df = cells - 1
    if df < 1:
        return
    # Wilson and Hilferty: (statistic / df)^(1/3) is nearly normal.
    z = ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    assert z < 4.3, f"chi-square {statistic:.1f} on {df} degrees of freedom"
