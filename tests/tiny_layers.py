"""Layers of tiny checkpoints, and hidden states to run through them, for tests of the quantizer. No pytest here."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny import by_name, write
from torch import Tensor

from convert.encoded import Layout
from convert.forward import LayerForward, Model, embed
from convert.source import Slot, Source


@dataclass(frozen=True)
class TinyModel:
    """A tiny checkpoint in memory. slots: of every layer, by key."""

    model: Model
    slots: list[dict[str, Slot]]

    def layer(self, i: int) -> tuple[LayerForward, dict[str, Tensor], dict[str, Slot]]:
        """Forward pass, weights, slots of layer `i`."""
        return self.model.layers[i], dict(self.model.weights[i]), self.slots[i]

    @torch.no_grad()
    def before(self, i: int, ids: Tensor) -> Tensor:
        """Hidden states before layer `i`, float32 (B, T, hidden)."""
        x = embed(self.model.spec, self.model.embedding, ids)
        for layer, w in zip(self.model.layers[:i], self.model.weights[:i], strict=True):
            x = layer(x, w)
        return x


def open_tiny(name: str, root: Path, length: int) -> TinyModel:
    """The family `name` of `tiny`, written below `root`."""
    with Source.open(write(by_name(name), root)) as source:
        slots = [{slot.key: slot for slot in source.slots(layer.index)} for layer in source.spec.layers]
        return TinyModel(Model.load(source, length), slots)


def ids_of(rows: int, length: int, seed: int = 0, vocab: int = 131) -> Tensor:
    """Random token ids, int64 (rows, length)."""
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def even(slots: dict[str, Slot], bits: int, size: int = 64) -> dict[str, Layout]:
    """One width everywhere, in groups of `size`."""
    return {
        key: tuple((bits, min(size, slot.inputs - start)) for start in range(0, slot.inputs, size))
        for key, slot in slots.items()
    }
