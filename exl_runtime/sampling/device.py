"""Sampling on a CUDA device: which requests can do without the host, and the state the device keeps for them.

Tokens are those the `Sampler` would draw (ext/cuda/sample.h says how closely); what a device cannot express keeps its
`Sampler`. Knows no models and no requests beyond slots.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops.sample_cuda import (
    CUTS,
    MOST_TOKENS,
    REALS,
    WHOLES,
    Flag,
    Real,
    Whole,
    ensure_weights,
    sample_rows,
    sample_tensors,
)
from .order import active_steps, is_dynamic, is_greedy
from .params import SamplingParams

_BY_ID = ("logit_bias", "penalties")
_PLAIN = ((), ("temperature",), ("min_p",), ("temperature", "min_p"))
NONE = -1


def why_not(params: SamplingParams, *, vocab_size: int, capacity: int) -> str | None:
    """None if the device can draw by these parameters, else why not, in words for a log.

    capacity  tokens of history that the device keeps
    """
    steps = active_steps(params)
    if params.logprobs:
        return "log-probabilities are wanted"
    if vocab_size > MOST_TOKENS:
        return f"the vocabulary has more than {MOST_TOKENS} tokens"
    unknown = [name for name in steps if name not in (*_BY_ID, "temperature", *CUTS)]
    if unknown:
        return f"{unknown[0]} is computed on the host"
    if "temperature" in steps and is_dynamic(params):
        return "a temperature that follows the entropy is computed on the host"
    if params.min_keep != 1 and any(name in CUTS for name in steps):
        return "min_keep is computed on the host"
    if "penalties" in steps and params.penalty_decay and params.penalty_range >= 0:
        return "penalties that fade are computed on the host"
    if "penalties" in steps and params.penalty_range >= capacity:
        return f"the device remembers {capacity} tokens, penalty_range is {params.penalty_range}"
    by_id = [name for name in steps if name in _BY_ID]
    rest = [name for name in steps if name not in _BY_ID]
    if [*steps] != [name for name in _BY_ID if name in by_id] + rest:
        return "this order of steps is computed on the host"
    if "temperature" in rest and rest[0] != "temperature" and rest[-1] != "temperature":
        return "a temperature between two cuts is computed on the host"
    return None


@dataclass(frozen=True, slots=True)
class _Slot:
    params: SamplingParams
    draws: bool
    selects: bool


class DeviceSampling:
    """Up to `slots` requests that draw on `device`; every method but `sample` is the host's bookkeeping.

    vocab_size  length of the rows of logits
    capacity    tokens of history kept for penalties with a range
    The tensors are made once and stay where they are, so that a CUDA graph may name them.
    """

    def __init__(self, *, slots: int, vocab_size: int, capacity: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.capacity = capacity
        self.device = device
        self.tensors = sample_tensors(slots=slots, vocab=vocab_size, capacity=capacity, device=device)
        # Two tables of bias for every slot: before and after min_tokens.
        self.tensors.bias = torch.zeros(2 * slots, vocab_size, dtype=torch.float32, device=device)
        self.tensors.counts = torch.zeros(slots, vocab_size, dtype=torch.int32, device=device)
        self._free = [*reversed(range(slots))]
        self._slots: dict[int, _Slot] = {}

    @property
    def room(self) -> int:
        """Slots that are free."""
        return len(self._free)

    def admit(
        self,
        params: SamplingParams,
        *,
        seed: int,
        eos_ids: Set[int],
        prompt: Sequence[int],
        generated: Sequence[int],
    ) -> int:
        """Take a slot for a request, `why_not` of whose parameters is None; `generated` tokens of it are drawn."""
        slot = self._free.pop()
        steps = active_steps(params)
        bias, early = self._bias(params, eos_ids)
        rest = [name for name in steps if name not in _BY_ID]
        cuts = [name for name in rest if name in CUTS]
        plain = bias is None and early is None and steps in _PLAIN
        greedy = is_greedy(params)
        flags = Flag.GREEDY if greedy else Flag.PLAIN if plain else Flag(0)
        if not plain and "temperature" in rest[1:]:
            flags |= Flag.TEMPERATURE_LAST
        reals = np.zeros(REALS)
        reals[Real.TEMPERATURE], reals[Real.MIN_P], reals[Real.TOP_P] = params.temperature, params.min_p, params.top_p
        reals[Real.REPETITION] = params.repetition_penalty
        reals[Real.FREQUENCY], reals[Real.PRESENCE] = params.frequency_penalty, params.presence_penalty
        wholes = np.zeros(WHOLES, dtype=np.int64)
        wholes[Whole.SEED] = np.uint64(seed).astype(np.int64)
        wholes[Whole.TOP_K] = params.top_k
        wholes[Whole.FLAGS] = int(flags)
        wholes[Whole.RANGE] = params.penalty_range
        wholes[Whole.MIN_TOKENS] = params.min_tokens
        wholes[Whole.BIAS] = NONE if bias is None else 2 * slot
        wholes[Whole.EARLY_BIAS] = NONE if early is None else 2 * slot + 1
        wholes[Whole.COUNTS] = slot if "penalties" in steps else NONE
        wholes[Whole.CUTS] = sum(CUTS[name] << 4 * place for place, name in enumerate(cuts))
        for table, row in ((bias, 2 * slot), (early, 2 * slot + 1)):
            if table is not None:
                self.tensors.bias[row].copy_(torch.from_numpy(table))
        self.tensors.reals[slot].copy_(torch.from_numpy(reals))
        self.tensors.wholes[slot].copy_(torch.from_numpy(wholes))
        selects = not greedy and not plain and bool(cuts)
        self._slots[slot] = _Slot(params, draws=not greedy, selects=selects)
        self.restore(slot, prompt=prompt, generated=generated)
        return slot

    def restore(self, slot: int, *, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Tell a slot what its history is: after admission, and when steps on the device were not used."""
        held = self._slots[slot]
        wholes = self.tensors.wholes
        wholes[slot, Whole.INDEX] = len(generated)
        if "penalties" not in active_steps(held.params):
            return
        tokens = np.asarray([*prompt, *generated], dtype=np.int64)
        tokens[(tokens < 0) | (tokens >= self.vocab_size)] = NONE
        reach = held.params.penalty_range
        window = tokens if reach < 0 else tokens[max(0, tokens.size - reach) :]
        counts = np.bincount(window[window >= 0], minlength=self.vocab_size).astype(np.int32)
        self.tensors.counts[slot].copy_(torch.from_numpy(counts))
        wholes[slot, Whole.LENGTH] = tokens.size
        if reach >= 0:
            ring = np.full(self.capacity, NONE, dtype=np.int32)
            places = np.arange(max(0, tokens.size - self.capacity), tokens.size)
            ring[places % self.capacity] = tokens[places]
            self.tensors.history[slot].copy_(torch.from_numpy(ring))

    def release(self, slot: int) -> None:
        """Give a slot back."""
        del self._slots[slot]
        self._free.append(slot)

    def kind(self, slots: Sequence[int]) -> tuple[bool, bool]:
        """(draws, selects) of a batch: which kernels it needs. Part of the key of a CUDA graph."""
        held = [self._slots[slot] for slot in slots]
        return any(one.draws for one in held), any(one.selects for one in held)

    def prepare(self, kind: tuple[bool, bool]) -> None:
        """Make the workspace that drawing of this kind needs: nothing may be allocated while a graph is recorded."""
        if kind[1]:
            ensure_weights(self.tensors)

    def sample(self, logits: Tensor, slots: Tensor, out: Tensor, *, kind: tuple[bool, bool]) -> None:
        """One token for each row of logits, float32 (rows, vocab), into `out`; the state of the slots moves on.

        slots  int32 (rows,) on the device, all different          out  int64 (rows,); -1: ask the `Sampler`, which
        will say what is wrong
        """
        draws, selects = kind
        sample_rows(logits, slots, self.tensors, out, draws=draws, selects=selects)

    def _bias(
        self, p: SamplingParams, eos_ids: Set[int]
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """What is added to the logits, and what is while the reply is shorter than min_tokens; None: nothing."""
        eos = [token for token in eos_ids if 0 <= token < self.vocab_size]
        always = [*p.banned_tokens, *(eos if p.ignore_eos else ())]
        if p.allowed_tokens is None and not always and not p.logit_bias and not p.min_tokens:
            return None, None
        table = np.zeros(self.vocab_size, dtype=np.float32)
        if p.allowed_tokens is not None:
            table.fill(-np.inf)
            table[[*p.allowed_tokens]] = 0.0
        table[always] = -np.inf
        for token, amount in p.logit_bias.items():
            table[token] += np.float32(amount)
        early = table.copy()
        early[eos] = -np.inf
        late, early = (one if np.any(one != 0) else None for one in (table, early))
        return late, early if p.min_tokens else late
