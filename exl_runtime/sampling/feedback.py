"""Transforms that steer by what was drawn before: mirostat and adaptive-p. One object serves one request.

They get the drawn token back through `observe`, in terms of the row they were last called with.
"""

import numpy as np
from numpy.typing import NDArray

from .ranked import best
from .transforms import REMOVED, Logits, kth_largest, min_p, probabilities


class Mirostat:
    """Holds the surprise of the drawn tokens near a target (Basu et al. 2021, "Mirostat").

    Version 2 removes tokens with surprise above mu bits (the best stays); version 1 estimates Zipf's exponent from the
    100 best tokens and derives a top-k. After a draw, mu -= eta * (surprise - tau), the surprise taken from the
    distribution that is left; mu starts at 2 tau. As in llama.cpp, but it runs at its place in the chain, on what the
    earlier steps left, instead of replacing them.
    """

    def __init__(self, *, version: int, tau: float, eta: float, vocab_size: int) -> None:
        self._version = version
        self._tau = tau
        self._eta = eta
        self._vocab_size = vocab_size
        self._row: Logits | None = None
        self.mu = 2.0 * tau

    def __call__(self, x: Logits) -> Logits:
        """Removes the tokens that are too surprising now."""
        self._row = self._by_surprise(x) if self._version == 2 else self._by_rank(x)
        return self._row

    def _by_surprise(self, x: Logits) -> Logits:
        surprise_of_best = -np.log2(probabilities(x).max())
        # -log2 p <= mu  <=>  p / p_max >= 2^(surprise_of_best - mu)
        ratio = 2.0 ** min(surprise_of_best - self.mu, 0.0)
        return min_p(x, ratio) if ratio > 0 else x

    def _by_rank(self, x: Logits) -> Logits:
        head = x[x >= kth_largest(x, min(100, x.size))]
        ranked = np.sort(head[head > REMOVED])[::-1][:100].astype(np.float64)
        steps = np.arange(ranked.size - 1)
        t = np.log((steps + 2) / (steps + 1))
        exponent = float(np.sum(t * -np.diff(ranked)) / np.sum(t * t)) if steps.size else 0.0
        return best(x, self._rank(exponent, x.size))

    def _rank(self, exponent: float, n: int) -> int:
        """The k whose top-k distribution has mu bits of surprise under Zipf's law with this exponent, 1..n."""
        if exponent < 1e-3:  # flat: the surprise of k equal tokens is log2 k
            log2_k = self.mu
        else:
            epsilon = exponent - 1
            log_n = np.log(self._vocab_size)
            # (1 - N^-e) / e tends to ln N at e = 0, where the quotient is 0 / 0
            spread = -np.expm1(-epsilon * log_n) / epsilon if abs(epsilon) > 1e-9 else log_n
            log2_k = (self.mu - np.log2(spread)) / exponent
        return int(min(max(2.0 ** min(log2_k, 60.0), 1.0), n))

    def observe(self, position: int) -> None:
        """The token at `position` of the row of the last call was drawn."""
        if self._row is None:
            return
        p = max(float(probabilities(self._row)[position]), 1e-30)  # a later step may pick what was all but impossible
        self.mu -= self._eta * (-np.log2(p) - self._tau)
        self._row = None


class AdaptiveP:
    """Keeps the probability of the drawn tokens near a target on average (MrJackSpade's adaptive-p, llama.cpp 17927).

    The aim of a step is 2 * target - average of the past, within 0..1, the average fading by `decay` a token and
    starting at the target. With d = |p - aim| / 0.3 the new logit is 5 - 10 d^2 / (1 + d). The average is over the
    probabilities the tokens had on entry to this step. Best after a mild cut such as min_p: a token that is
    impossible in effect would otherwise come within reach.
    """

    _WIDTH = 0.3
    _PEAK = 5.0
    _SHARPNESS = 10.0

    def __init__(self, *, target: float, decay: float) -> None:
        self._target = target
        self._decay = decay
        self._p: NDArray[np.float64] | None = None
        self._sum = target / (1 - decay)
        self._count = 1 / (1 - decay)

    @property
    def aim(self) -> float:
        """The probability favoured now."""
        return min(max(2 * self._target - self._sum / self._count, 0.0), 1.0)

    def __call__(self, x: Logits) -> Logits:
        """Logits by distance from the aim; removed tokens stay removed."""
        self._p = probabilities(x)
        d = np.abs(self._p - self.aim) / self._WIDTH
        logits = self._PEAK - self._SHARPNESS * d * d / (1 + d)
        return np.where(x > REMOVED, logits, REMOVED).astype(np.float32)

    def observe(self, position: int) -> None:
        """The token at `position` of the row of the last call was drawn."""
        if self._p is None:
            return
        self._sum = float(self._p[position]) + self._decay * self._sum
        self._count = 1 + self._decay * self._count
        self._p = None
