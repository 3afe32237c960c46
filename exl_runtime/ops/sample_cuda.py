"""Drawing tokens on a CUDA device: the tensors behind ext/cuda/sample.h, and the two operators over them.

Knows the layout of a slot and no sampling settings: what goes into the fields is `sampling.device`'s affair.
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import torch
from torch import Tensor

from .native import cuda_ops

CHUNK = 1024  # kSampleChunk
MOST_TOKENS = 1 << 19  # kSampleVocab


class Real(IntEnum):
    """Columns of `SampleTensors.reals`."""

    TEMPERATURE = 0
    MIN_P = 1
    TOP_P = 2
    REPETITION = 3
    FREQUENCY = 4
    PRESENCE = 5


class Whole(IntEnum):
    """Columns of `SampleTensors.wholes`; ext/cuda/sample.h says what each means."""

    SEED = 0
    INDEX = 1
    TOP_K = 2
    FLAGS = 3
    RANGE = 4
    LENGTH = 5
    MIN_TOKENS = 6
    BIAS = 7
    EARLY_BIAS = 8
    COUNTS = 9
    CUTS = 10


class Flag(IntFlag):
    """Bits of the column FLAGS."""

    GREEDY = 1
    PLAIN = 2
    TEMPERATURE_LAST = 4


REALS, WHOLES = 8, 12
CUTS = {"top_k": 1, "top_p": 2, "min_p": 3}  # digits of the column CUTS


@dataclass(slots=True)
class SampleTensors:
    """State of `slots` requests and the workspace for one row of each, on one device.

    reals     float64 (slots, REALS)        wholes   int64 (slots, WHOLES)
    bias      float32 (tables, vocab)       counts   int32 (tables, vocab)       history  int32 (slots, capacity)
    x         float32 (slots, vocab)        weights  int64 (slots, vocab), made when a row first selects
    work      int64 (slots, ...)
    """

    reals: Tensor
    wholes: Tensor
    bias: Tensor
    counts: Tensor
    history: Tensor
    x: Tensor
    work: Tensor
    weights: Tensor | None = None


def sample_tensors(*, slots: int, vocab: int, capacity: int, device: torch.device) -> SampleTensors:
    """Fresh tensors without tables; `capacity` tokens of history for each slot."""
    chunks = -(-vocab // CHUNK)

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return SampleTensors(
        reals=zeros((slots, REALS), torch.float64),
        wholes=zeros((slots, WHOLES), torch.int64),
        bias=zeros((0, vocab), torch.float32),
        counts=zeros((0, vocab), torch.int32),
        history=zeros((slots, capacity), torch.int32),
        x=zeros((slots, vocab), torch.float32),
        work=zeros((slots, 2 * chunks + 3), torch.int64),
    )


def ensure_weights(state: SampleTensors) -> None:
    """Make the workspace of rows that select, if it is not there."""
    if state.weights is None:
        state.weights = torch.zeros(state.x.shape, dtype=torch.int64, device=state.x.device)


def sample_rows(
    logits: Tensor, slots: Tensor, state: SampleTensors, out: Tensor, *, draws: bool, selects: bool
) -> None:
    """One token for each row into `out`, int64 (rows,), -1 where there is none; see ext/cuda/sample.h.

    logits  float32 (rows, vocab)          slots  int32 (rows,), all different
    draws   some row is not greedy         selects  some row has top-k or top-p
    """
    if selects:
        ensure_weights(state)
    cuda_ops(logits.device).sample(
        logits,
        slots,
        state.reals,
        state.wholes,
        state.bias,
        state.counts,
        state.history,
        state.x,
        state.weights if selects else None,
        state.work,
        out,
        draws,
    )


def advance(
    drawn: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, kv_lengths: Tensor, pages: Tensor, page_size: int
) -> None:
    """The next step of rows that each drew one token, written over the last one; see ext/cuda/sample.h."""
    cuda_ops(drawn.device).advance(drawn, tokens, positions, slots, kv_lengths, pages, page_size)
