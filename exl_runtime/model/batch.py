"""`ForwardBatch`: everything one forward pass needs to know, and nothing else."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """A ragged batch: the new tokens of all S sequences one after another (T in total), no padding.

    Query i of sequence s sits at cache index kv_lengths[s] - (q_starts[s+1] - q_starts[s]) + i and sees the
    cache indices up to its own (causal). All tensors live on the model's device.
    """

    tokens: Tensor  # int64 (T,)
    positions: Tensor  # int64 (T,) rope position of every token
    slots: Tensor  # int64 (T,) where its key and value are stored: page * page_size + offset
    q_starts: Tensor  # int32 (S+1,) first row of every sequence in the T rows, then T
    kv_lengths: Tensor  # int32 (S,) keys of the sequence after this pass
    pages: Tensor  # int32 (S, P) page table; entries past the last used page are 0
    rope_lengths: tuple[int, ...]  # per sequence, ModelSpec.rope_length of its plan
    logit_rows: Tensor  # int64 (L,) rows of the T whose logits are wanted
    last_position: int | None = None  # the greatest of `positions`, where it is known
