"""`Sampler`: the pipeline of one request, its state and its random numbers. Knows no other request.

A token depends on the logits, the tokens so far, the parameters and the seed, and (mirostat, adaptive-p) on the
tokens this very Sampler drew; never on the batch around it.
"""

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, UsageError
from ..ops import native
from ..ops import sample as kernels
from .draw import Draw, greedy, inverse_cdf, with_logprobs
from .history import History
from .order import active_steps, is_dynamic, is_greedy
from .params import SamplingParams
from .penalties import Tokens
from .pipeline import Turn, build_pipeline, never_chosen
from .random import uniform
from .transforms import REMOVED, Logits

_NO_HISTORY: Tokens = np.empty(0, dtype=np.int64)
_FEW = 64  # banned tokens that a kernel steps around


class Sampler:
    """Draws the tokens of one request; make a new one for each.

    vocab_size       length of the rows of logits
    seed             0 to 2^64 - 1; the number for a token is a function of the seed and of how many came before
    dry_breaker_ids  ids of all tokens that contain one of params.dry_sequence_breakers
    eos_ids          end tokens; needed (if only as an empty set) for min_tokens and ignore_eos
    Raises UsageError for token ids in `params` that the vocabulary does not have.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        seed: int,
        dry_breaker_ids: Set[int] = frozenset(),
        eos_ids: Set[int] | None = None,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise UsageError(f"seed is {seed}, allowed: 0 to 2^64 - 1")
        self.params = params
        self.seed = seed
        self.vocab_size = vocab_size
        self.pipeline = build_pipeline(params, vocab_size=vocab_size, eos_ids=eos_ids, dry_breaker_ids=dry_breaker_ids)
        self._greedy = is_greedy(params)
        self._history = History(vocab_size) if any(step.looks_back for step in self.pipeline) else None
        # A kernel does bans, temperature, min_p and draw in one pass; it takes over where the pipeline is just that.
        always, early = never_chosen(params, vocab_size, eos_ids)
        self._banned, self._banned_early = sorted(always), sorted(early)
        plain = params.allowed_tokens is None and len(early) <= _FEW and not is_dynamic(params) and params.min_keep == 1
        self._fused = plain and active_steps(params) in ((), ("temperature",), ("min_p",), ("temperature", "min_p"))

    def sample(self, logits: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> Draw:
        """The next token.

        logits     float32 (vocab,), any device; -inf means "not allowed"
        prompt     the tokens before the reply; one list object must not be edited while the Sampler is in use
        generated  the reply so far; its length is the index of the token to draw
        Raises NonFiniteError (NaN, +inf, or all -inf) and UsageError (bans leave no token).
        """
        if logits.dim() != 1 or logits.shape[0] != self.vocab_size:
            raise ValueError(f"logits have shape {tuple(logits.shape)}, the sampler was made for ({self.vocab_size},)")
        index = len(generated)
        raw = token = None
        if self._fused and native.loaded() and logits.is_cpu:
            token = self._draw_fused(logits if logits.dtype == torch.float32 else logits.float(), index)
        if token is None:
            raw = _row(logits)
            _check(raw, index)
            history = _NO_HISTORY if self._history is None else self._history.tokens(prompt, generated)
            token = self._choose(raw, Turn(history=history, index=index, seed=self.seed))
        if not self.params.logprobs:
            return Draw(token)
        return with_logprobs(token, _row(logits) if raw is None else raw, self.params.logprobs)

    def by_kernel(self, index: int) -> tuple[float, float, float, Sequence[int]] | None:
        """How a kernel may draw reply token `index` in place of `sample`, to the same result; None: only `sample` can.

        Temperature (0: the best token), min_p, the random number of this token, banned ids in ascending order.
        """
        if not self._fused or self.params.logprobs:
            return None
        banned = self._banned_early if index < self.params.min_tokens else self._banned
        if self._greedy:
            return 0.0, 0.0, 0.0, banned
        return self.params.temperature, self.params.min_p, uniform(self.seed, index), banned

    def guess(self, logits: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> int:
        """The token `sample` would draw from these logits, without having drawn it: nothing is remembered.

        For guesses ahead from the logits of another model. Raises as `sample`.
        """
        before = self.state()
        try:
            return self.sample(logits, prompt, generated).id
        finally:
            self.restore(before)

    def judge(self, token: int, logits: Tensor) -> Draw:
        """The Draw of `token` with log-probabilities under `logits`, float32 (vocab,), as far as they are wanted."""
        return with_logprobs(token, _row(logits), self.params.logprobs) if self.params.logprobs else Draw(token)

    def state(self) -> tuple[dict[str, Any], ...]:
        """What the draws so far left behind (mirostat, adaptive-p); () where nothing does."""
        return tuple(dict(vars(step.observer)) for step in self.pipeline if step.observer is not None)

    def restore(self, state: tuple[dict[str, Any], ...]) -> None:
        """Go back to an earlier `state`: draws after it were taken back."""
        observers = [step.observer for step in self.pipeline if step.observer is not None]
        for observer, values in zip(observers, state, strict=True):
            vars(observer).update(values)

    def _draw_fused(self, logits: Tensor, index: int) -> int | None:
        """None: the masks leave no token, and the pipeline will say so."""
        p = self.params
        banned = self._banned_early if index < p.min_tokens else self._banned
        try:
            if self._greedy:
                return kernels.argmax(logits, banned)
            u = uniform(self.seed, index)
            return kernels.sample_min_p(logits, temperature=p.temperature, min_p=p.min_p, u=u, banned=banned)
        except NonFiniteError:
            if not banned:
                raise
            return None

    def _choose(self, raw: Logits, turn: Turn) -> int:
        x, ids = raw, None  # ids[i] is the token of x[i]; None: x is the whole row
        heard_at = []
        for step in self.pipeline:
            if step.by_id and ids is not None:
                whole = np.full(self.vocab_size, REMOVED)
                whole[ids] = x
                x, ids = whole, None
            x = step.run(x, turn)
            if step.observer is not None:
                heard_at.append((step.observer, ids))
            if step.cuts:
                left = np.flatnonzero(x > REMOVED)
                if left.size < x.size:
                    x = x[left]
                    ids = left if ids is None else ids[left]
        place = greedy(x) if self._greedy else inverse_cdf(x, uniform(turn.seed, turn.index))
        token = place if ids is None else int(ids[place])
        for observer, seen in heard_at:
            observer.observe(token if seen is None else int(np.searchsorted(seen, token)))
        return token


def sample_batch(
    samplers: Sequence[Sampler], logits: Tensor, histories: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Draw]:
    """One token for each row, each as if it were alone; the rows only share the way from the device.

    samplers[i] draws from logits[i] (float32 (L, vocab)) after histories[i] = (prompt, generated). Raises as `sample`.
    """
    if not len(samplers) == logits.shape[0] == len(histories):
        raise ValueError(f"{len(samplers)} samplers, {logits.shape[0]} rows of logits, {len(histories)} histories")
    rows = logits.cpu()
    parts = zip(samplers, rows, histories, strict=True)
    return [sampler.sample(row, prompt, generated) for sampler, row, (prompt, generated) in parts]


def _row(logits: Tensor) -> Logits:
    row: Logits = logits.to("cpu", torch.float32).numpy()
    return row


def _check(row: Logits, index: int) -> None:
    if np.isfinite(row.max()):  # NaN and +inf come out on top; removed tokens may be there
        return
    bad = np.flatnonzero(~(row < np.inf))
    if bad.size:
        raise NonFiniteError(
            f"{bad.size} of {row.size} logits for reply token {index} are NaN or infinite, the first is {row[bad[0]]} "
            f"at token {bad[0]}",
            hint="the checkpoint is damaged, or its activations overflow in this dtype",
        )
    raise NonFiniteError(f"all {row.size} logits for reply token {index} are -infinity: no token is left to choose")
