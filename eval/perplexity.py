"""Perplexity: how many tokens the model hesitates between, on average, at each token of a text."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exl_runtime.errors import EvalError

from .protocol import Window
from .scoring import token_nll

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime

Advance = Callable[[int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """nll: mean negative log-likelihood of the scored tokens, in nats. perplexity: exp(nll).

    stderr      standard error of `nll`, from how much windows differ: tokens of one window depend on each other, so a
                window counts as one draw (the variance of a ratio of sums over clusters, Cochran, Sampling Techniques,
                section 6.3). That of the perplexity is perplexity * stderr. Windows that overlap share
                tokens: with the exl2 protocol it is an underestimate. NaN for a single window.
    tokens      scored                       processed   run through the model, context included
    seconds     spent in the model           partial     the user ended it before the last window
    """

    nll: float
    perplexity: float
    stderr: float
    tokens: int
    processed: int
    windows: int
    seconds: float
    partial: bool

    @property
    def tokens_per_second(self) -> float:
        """Tokens run through the model per second."""
        return self.processed / self.seconds if self.seconds > 0 else 0.0


def measure(runtime: "Runtime", windows: Iterable[Window], advance: Advance = lambda n, note: None) -> Perplexity:
    """Score `windows`, which may be any number: nothing of them is kept.

    advance(1, note)   is called after each one; the note holds the perplexity so far
    After Ctrl-C (KeyboardInterrupt) what there is by then is returned as partial; before the first window is done it
    passes through. Raises EvalError, PromptTooLong as `scoring.score`, and what `windows` raises.
    """
    sums = _Sums()
    seconds = 0.0
    partial = False
    try:
        for window in windows:
            started = time.perf_counter()
            nll = token_nll(runtime, window)
            seconds += time.perf_counter() - started
            sums.add(float(nll.sum()), len(nll), len(window.ids))
            advance(1, f"perplexity {_exp(sums.mean):.4f}")
    except KeyboardInterrupt:
        if not sums.windows:
            raise
        partial = True
    if not sums.windows:
        raise EvalError("no window to score", hint="give a text with more tokens")
    return Perplexity(
        nll=sums.mean,
        perplexity=_exp(sums.mean),
        stderr=sums.stderr,
        tokens=sums.tokens,
        processed=sums.processed,
        windows=sums.windows,
        seconds=seconds,
        partial=partial,
    )


class _Sums:
    """Over windows: of the sums s and counts n of their tokens' values, and the products a variance needs."""

    def __init__(self) -> None:
        self.windows = self.tokens = self.processed = 0
        self._s = self._ss = self._sn = self._nn = 0.0
        self._origin = 0.0  # about the mean, from the first window: keeps the squares below from cancelling

    def add(self, total: float, tokens: int, processed: int) -> None:
        """One window."""
        if not self.windows:
            self._origin = total / tokens
        s = total - self._origin * tokens
        self.windows += 1
        self.tokens += tokens
        self.processed += processed
        self._s += s
        self._ss += s * s
        self._sn += s * tokens
        self._nn += float(tokens) * tokens

    @property
    def mean(self) -> float:
        """Over tokens."""
        return self._origin + self._s / self.tokens

    @property
    def stderr(self) -> float:
        """See `Perplexity`."""
        if self.windows < 2:
            return math.nan
        r = self._s / self.tokens
        squares = self._ss - 2 * r * self._sn + r * r * self._nn
        return math.sqrt(max(0.0, squares) * self.windows / (self.windows - 1)) / self.tokens


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
