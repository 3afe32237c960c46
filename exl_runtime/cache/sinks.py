"""The first tokens of a conversation, kept while what follows them leaves. Knows pages and layers, no tokens.

Positions go on growing when old tokens leave, so that the keys of those that stay need not change. Only the few first
ones, on which attention leans (Xiao et al. 2023), move along: rope turns a key by position * frequency, so a key at
position p becomes the key at p + shift by turning it by shift * frequency more. That is always done from the copy of
the keys as they were computed: however often a window moves, there is one rounding, and the same for everybody.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..ops.kv_quant import dequantize, quantize
from ..ops.rope import rope
from .rows import move_rows, slots_of, write_rows
from .storage import KVStorage
from .tiers import Part

# layer, planned tokens -> radians per position; None where keys know no position
Frequencies: TypeAlias = Callable[[int, int], Tensor | None]


@dataclass(frozen=True, slots=True)
class Sinks:
    """Pages as they were computed: per store and layer the keys and values, each (pages, page_size, kv_heads, row)."""

    stores: tuple[tuple[tuple[Tensor, Tensor], ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layers in self.stores for pair in layers for tensor in pair)


class SinkKeeper:
    """Copies of sinks, the latest used longest, within `limit` bytes (the latest one always stays). Of the layers that
    see all; out of the sight of windows there is nothing to move.

    stores  for every model that uses the same page numbers: its pages, and the frequencies of its layers
    """

    def __init__(self, stores: Sequence[tuple[KVStorage, Frequencies]], *, limit: int | None = None) -> None:
        self._stores = tuple(stores)
        self._limit = sum(kv.nbytes for kv, _ in self._stores) // 8 if limit is None else limit
        self._kept: dict[bytes, Sinks] = {}  # oldest first

    def find(self, key: bytes) -> Sinks | None:
        """What was kept under `key`."""
        sinks = self._kept.pop(key, None)
        if sinks is not None:
            self._kept[key] = sinks
        return sinks

    @torch.inference_mode()
    def keep(self, key: bytes, pages: Sequence[int]) -> Sinks:
        """A copy of what these pages hold, found again under `key`."""
        stores = []
        for kv, _ in self._stores:
            layers = (kv.layer(index) for index in _layers(kv))
            stores.append(tuple((keys[list(pages)], values[list(pages)]) for keys, values in layers))
        sinks = Sinks(tuple(stores))
        self._kept.pop(key, None)
        self._kept[key] = sinks
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self._limit:
            del self._kept[next(iter(self._kept))]
        return sinks

    def write(self, sinks: Sinks, pages: Sequence[int], *, shift: int, planned: int, tokens: int | None = None) -> None:
        """Put the sinks, or only their first `tokens`, into the beginning of these pages, `shift` positions later than
        they were computed.

        `planned`: tokens the sequence is planned to reach, which some ropes depend on.
        """
        for (kv, frequencies), layers in zip(self._stores, sinks.stores, strict=True):
            size = kv.geometry.page_size
            count = len(pages) * size if tokens is None else tokens
            slots = slots_of(pages, size, 0, count)
            for index, (keys, values) in zip(_layers(kv), layers, strict=True):
                k_pages, v_pages = kv.layer(index)
                some, inv_freq = keys.flatten(0, 1)[None, :count], frequencies(index, planned)
                turned = shifted(some, inv_freq, shift, kv.geometry.head_dim, kv.geometry.type.key_bits)
                write_rows(k_pages, slots, turned[0])
                write_rows(v_pages, slots, values.flatten(0, 1)[:count])

    def move(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy what other tokens have in these slots of a group of layers, see `move_rows`."""
        for kv, _ in self._stores:
            move_rows(Part.of(kv, group), sources, targets)


def _layers(kv: KVStorage) -> tuple[int, ...]:
    """The layers that see all."""
    first = kv.geometry.groups[0]
    return first.layers if first.window is None else ()


def shifted(keys: Tensor, inv_freq: Tensor | None, shift: int, head_dim: int, key_bits: int = 0) -> Tensor:
    """Keys (pages, page_size, kv_heads, row) as they would be `shift` positions later; rows of codes: key_bits > 0.

    inv_freq  float32 (rotary_dim / 2,), radians per position; None: keys that know no position
    """
    if inv_freq is None or not shift:
        return keys
    plain = dequantize(keys, head_dim, key_bits) if key_bits else keys
    # Of a large angle float32 would keep but a few digits behind the point.
    angles = inv_freq.to(device=keys.device, dtype=torch.float64)[None] * shift
    flat = plain.flatten(0, 1)
    turned, _ = rope(flat, flat[:0], angles.cos().float(), angles.sin().float())
    turned = turned.view(plain.shape)
    return quantize(turned, key_bits) if key_bits else turned
