"""The angles of a pass: cosines and sines for every rope of a model, computed once per position where that pays."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config.spec import ModelSpec, RopeSpec
from ..ops.native import torch_alone
from ..ops.rope import cos_sin, frequencies
from .batch import ForwardBatch, Plan

KEPT_FREQUENCIES = 64
TABLE_STEP = 1024  # positions
TABLE_MOST = 1 << 16  # positions; a table of 128 rotated dimensions is then 32 MiB


class Angles:
    """Of distinct ropes, numbered in order. A table holds what `cos_sin` gives for positions 0, 1, 2, ..."""

    def __init__(self, ropes: Sequence[RopeSpec], device: torch.device) -> None:
        self.ropes = tuple(ropes)
        self._device = device
        self._frequencies: dict[tuple[int, int], Tensor] = {}
        self._lengths: tuple[int, ...] | None = None  # for which the tables are
        self._reach = 0  # positions that they hold
        self._tables: list[Tensor] = []
        self._far: tuple[tuple[int, ...], int] | None = None  # for which the far tables are: lengths, first position
        self._far_tables: list[Tensor] = []
        self._fixed = not any(rope.depends_on_length for rope in self.ropes)
        self._zeros = (0,) * len(self.ropes)

    def of(self, number: int, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """cos and sin of every token of a pass, float32 (T, rotary_dim / 2)."""
        rope = self.ropes[number]
        lengths = [rope.effective_length(planned) for planned in batch.rope_lengths]
        if len(set(lengths)) <= 1:
            inv_freq = self._inv_freq(number, lengths[0] if lengths else 0)
            return cos_sin(inv_freq, batch.positions, rope.attention_factor)
        # Sequences of different plans share the pass: each rotates by its own frequencies.
        starts = batch.q_starts.tolist()
        parts = [
            cos_sin(self._inv_freq(number, length), batch.positions[start:stop], rope.attention_factor)
            for length, start, stop in zip(lengths, starts[:-1], starts[1:], strict=True)
        ]
        return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])

    def of_all(self, batch: ForwardBatch) -> dict[RopeSpec, tuple[Tensor, Tensor]]:
        """`of` for every rope."""
        return {rope: self.of(number, batch) for number, rope in enumerate(self.ropes)}

    def read_by(self, batch: ForwardBatch) -> tuple[Tensor, ...]:
        """The frequencies that `of_all` computes from, which may be dropped later."""
        planned = dict.fromkeys(batch.rope_lengths)
        return tuple(
            self._inv_freq(number, rope.effective_length(length))
            for number, rope in enumerate(self.ropes)
            for length in planned
        )

    def rows(self, plan: Plan) -> tuple[list[Tensor], Sequence[int]]:
        """cos, sin, cos, sin, ... of all ropes, float32 (n, rotary_dim / 2), and the row in them of every token.

        The list is the same object while the tables are.
        """
        if self._fixed:
            lengths: tuple[int, ...] | None = self._zeros
        else:
            found = {tuple(rope.effective_length(planned) for rope in self.ropes) for planned in plan.rope_lengths}
            lengths = found.pop() if len(found) == 1 else None
        last = max(plan.positions, default=0)
        if lengths is not None and last < TABLE_MOST:
            if lengths != self._lengths or last >= self._reach:
                self._fill(lengths, last)
            return self._tables, plan.positions
        first = min(plan.positions, default=0)
        base = first - first % TABLE_STEP
        if lengths is not None and last < base + 2 * TABLE_STEP:  # a window that rolls, far from the beginning
            if (lengths, base) != self._far:
                self._far, self._far_tables = (lengths, base), self._tables_of(lengths, base, base + 2 * TABLE_STEP)
            return self._far_tables, [position - base for position in plan.positions]
        batch = plan.on(self._device)
        parts = [part for number in range(len(self.ropes)) for part in self.of(number, batch)]
        return parts, range(len(plan.positions))

    def _fill(self, lengths: tuple[int, ...], last: int) -> None:
        """Tables that reach beyond `last`, and twice as far as before while a sequence grows."""
        known = self._reach if lengths == self._lengths else 0
        reach = min(max(2 * known, -(-(last + 1) // TABLE_STEP) * TABLE_STEP), TABLE_MOST)
        self._tables = self._tables_of(lengths, 0, reach)
        self._lengths, self._reach = lengths, reach

    def _tables_of(self, lengths: tuple[int, ...], start: int, stop: int) -> list[Tensor]:
        positions = torch.arange(start, stop, device=self._device)
        tables: list[Tensor] = []
        with torch_alone():
            for number, (rope, length) in enumerate(zip(self.ropes, lengths, strict=True)):
                tables += cos_sin(self._inv_freq(number, length), positions, rope.attention_factor)
        return tables

    def _inv_freq(self, number: int, length: int) -> Tensor:
        key = (number, length)
        if key not in self._frequencies:
            if len(self._frequencies) >= KEPT_FREQUENCIES:  # dynamic ropes have a set for every length
                self._frequencies.clear()
            rope = self.ropes[number]
            self._frequencies[key] = frequencies(
                kind=rope.kind,
                theta=rope.theta,
                rotary_dim=rope.rotary_dim,
                factor=rope.factor,
                original_context=rope.original_context,
                length=length,
                beta_fast=rope.beta_fast,
                beta_slow=rope.beta_slow,
                truncate=rope.truncate,
                low_freq_factor=rope.low_freq_factor,
                high_freq_factor=rope.high_freq_factor,
                short_factor=rope.short_factor,
                long_factor=rope.long_factor,
            ).to(self._device)
        return self._frequencies[key]


def key_frequencies(spec: ModelSpec) -> Callable[[int, int], Tensor | None]:
    """(layer, planned length) -> radians per position by which that layer turns its keys; None where it does not."""
    ropes = {layer.index: layer.rope for layer in spec.layers}
    angles = Angles(tuple(dict.fromkeys(ropes.values())), torch.device("cpu"))

    def of(layer: int, planned: int) -> Tensor | None:
        rope = ropes.get(layer)
        return None if rope is None else angles._inv_freq(angles.ropes.index(rope), rope.effective_length(planned))

    return of
