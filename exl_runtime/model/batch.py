"""`ForwardBatch`: everything one forward pass needs to know, and nothing else. `Plan`: the same in plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import Self

from ..cache.geometry import CacheGeometry

if TYPE_CHECKING:
    from .lora import Mix


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """A ragged batch: the new tokens of all S sequences one after another (T in total), no padding.

    Query i of sequence s sits at cache index kv_lengths[s] - (q_starts[s+1] - q_starts[s]) + i and sees the
    cache indices up to its own (causal). All tensors live on the model's device.

    Where the layers of a model are in G groups (`CacheGeometry.groups`), each has pages of its own: `slots` and `pages`
    then have those of all groups one after another, and `by_group` takes them apart.
    """

    tokens: Tensor  # int64 (T,)
    positions: Tensor  # int64 (T,) rope position of every token
    slots: Tensor  # int64 (G * T,) where its key and value are stored: page * page_size + offset
    q_starts: Tensor  # int32 (S+1,) first row of every sequence in the T rows, then T
    kv_lengths: Tensor  # int32 (S,) keys of the sequence after this pass
    pages: Tensor  # int32 (G * S, P) page table; entries past the last used page, and those that have left, are 0
    rope_lengths: tuple[int, ...]  # per sequence, ModelSpec.rope_length of its plan
    logit_rows: Tensor  # int64 (L,) rows of the T whose logits are wanted

    def by_group(self) -> "tuple[ForwardBatch, ...]":
        """What the layers of every group see of it."""
        total, sequences = self.tokens.shape[0], self.kv_lengths.shape[0]
        if self.slots.shape[0] == total:
            return (self,)
        both = zip(self.slots.split(total), self.pages.split(sequences), strict=True)
        return tuple(replace(self, slots=slots, pages=pages) for slots, pages in both)


def by_layer(batch: ForwardBatch, geometry: CacheGeometry) -> Sequence[ForwardBatch]:
    """What every layer of the model sees of a batch, by its index."""
    groups = batch.by_group()
    if len(groups) == 1:
        return groups * geometry.layers
    placed = {layer: seen for seen, group in zip(groups, geometry.groups, strict=True) for layer in group.layers}
    return [placed[layer] for layer in range(geometry.layers)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The fields of a ForwardBatch before there are tensors: a native pass wants none for a handful of numbers."""

    tokens: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    q_starts: Sequence[int]
    kv_lengths: Sequence[int]
    pages: Tensor  # on the model's device; the same one from token to token
    rope_lengths: tuple[int, ...]
    logit_rows: Sequence[int]
    mixes: "tuple[Mix, ...]" = ()  # per sequence, what `lora.Adapted` adds; (): nothing for all of them

    @classmethod
    def of(cls, batch: ForwardBatch) -> Self:
        """The plan of a batch."""
        return cls(
            tokens=batch.tokens.tolist(),
            positions=batch.positions.tolist(),
            slots=batch.slots.tolist(),
            q_starts=batch.q_starts.tolist(),
            kv_lengths=batch.kv_lengths.tolist(),
            pages=batch.pages,
            rope_lengths=batch.rope_lengths,
            logit_rows=batch.logit_rows.tolist(),
        )

    def on(self, device: torch.device) -> ForwardBatch:
        """The batch of a plan."""
        total, sequences, wanted = len(self.tokens), len(self.kv_lengths), len(self.logit_rows)
        # Two transfers instead of seven: everything of one width travels in one tensor.
        wide = torch.tensor([*self.tokens, *self.positions, *self.slots, *self.logit_rows], dtype=torch.int64)
        narrow = torch.tensor([*self.q_starts, *self.kv_lengths], dtype=torch.int32).to(device)
        tokens, positions, slots, logit_rows = wide.to(device).split([total, total, len(self.slots), wanted])
        q_starts, kv_lengths = narrow.split([sequences + 1, sequences])
        return ForwardBatch(
            tokens=tokens,
            positions=positions,
            slots=slots,
            q_starts=q_starts,
            kv_lengths=kv_lengths,
            pages=self.pages,
            rope_lengths=self.rope_lengths,
            logit_rows=logit_rows,
        )
