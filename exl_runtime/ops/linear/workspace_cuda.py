"""Buffers that all matrices on one card share: staged inputs, partial sums, weights on their way to a library call.

Sized when matrices are built, never per call. Products on one card run one after another on one stream, so sharing is
safe; a second stream would need a second workspace.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import native
from .plan_cuda import SEGMENT_WORDS, Cut, cut

SKINNY_ROWS, SKINNY_WIDTH = 32, 2  # ext/cuda/skinny.h
GEMM_ROWS, GEMM_WIDTH = 64, 4
MOST_ROWS = 256
BLOCKS_PER_PROCESSOR = 2
FEWEST_UNITS = 8  # of a segment: two for each part of a block of threads
PANEL_BYTES = 32 << 20  # of weights in half precision: stays in the second-level cache of most cards


def workspace_bytes(inputs: int, processors: int = 192) -> int:
    """Most bytes that a card's workspace takes for matrices of up to `inputs` inputs, by default on the largest cards.

    Groups that fill their last unit badly can add to it.
    """
    partials = (2 * processors * BLOCKS_PER_PROCESSOR + 8) * (GEMM_ROWS * GEMM_WIDTH * 32 * 4 + 4)
    panel = 2 * max(inputs * 32, min(PANEL_BYTES // 2, inputs * 2048))
    return partials + 2 * inputs * MOST_ROWS + 4 * MOST_ROWS + panel


@dataclass(eq=False)
class Workspace:
    """One card's buffers. Outgrown ones are kept: a recorded graph may still hold their addresses."""

    device: torch.device
    processors: int
    partials: Tensor
    tickets: Tensor  # int32, all zero between launches
    staged: Tensor
    factors: Tensor
    panel: Tensor
    outgrown: list[Tensor] = field(default_factory=list)

    def reserve(self, positions: int, inputs: int) -> None:
        """Room for `positions` of a staged input, and for one tile column of `inputs` weights."""
        if self.staged.numel() < positions * MOST_ROWS:
            self.outgrown.append(self.staged)
            self.staged = torch.empty(positions * MOST_ROWS, dtype=torch.float16, device=self.device)
        least = max(inputs * 32, min(PANEL_BYTES // 2, inputs * 2048))
        if self.panel.numel() < least:
            self.outgrown.append(self.panel)
            self.panel = torch.empty(least, dtype=torch.float16, device=self.device)

    def cuts(
        self, matrices: Sequence[tuple[int, tuple[int, ...]]], *, gated: bool = False
    ) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Segments, first and slots of the three ranges of batch sizes (linear_plan), on the card.

        matrices  (outputs, lines before every unit and in all) of each; two if `gated`, which share every column group
        """
        blocks = self.processors * BLOCKS_PER_PROCESSOR
        room = self.tickets.numel()
        narrow = 1
        if gated:
            narrow = 2
            (outputs, first_lines), (_, second_lines) = matrices
            matrices = [(outputs, tuple(a + b for a, b in zip(first_lines, second_lines, strict=True)))]
        segments, first, slots = [], [], []
        for width, count, most in (
            (SKINNY_WIDTH, blocks, room),
            (GEMM_WIDTH, blocks, room),
            (GEMM_WIDTH, -(-blocks // 4), room // 4),
        ):
            plan = cut(matrices, width=width // narrow, blocks=count, fewest=FEWEST_UNITS, most_slots=most)
            segments.append(self._table(plan))
            first.append(torch.tensor(plan.first, dtype=torch.int32, device=self.device))
            slots.append(plan.slots)
        return segments, first, slots

    def _table(self, plan: Cut) -> Tensor:
        rows = torch.tensor(plan.segments, dtype=torch.int32).view(-1, SEGMENT_WORDS)
        return rows.to(self.device)


# A workspace lives as long as a matrix uses it: a closed model leaves nothing on the card.
_workspaces: MutableMapping[torch.device, Workspace] = WeakValueDictionary()


def workspace(device: torch.device) -> Workspace:
    """The workspace of `device`, made on first use."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found = _workspaces.get(device)
    if found is None:
        found = _workspaces[device] = _make(device)
    return found


def _make(device: torch.device) -> Workspace:
    processors = native.cuda_ops(device).multiprocessors(torch.empty(0, device=device))
    # A cut inside a column group makes at most two more partial sums, and there are fewer cuts than blocks.
    slots = 2 * processors * BLOCKS_PER_PROCESSOR + 8
    return Workspace(
        device=device,
        processors=processors,
        partials=torch.empty(slots * GEMM_ROWS * GEMM_WIDTH * 32, dtype=torch.float32, device=device),
        tickets=torch.zeros(slots, dtype=torch.int32, device=device),
        staged=torch.empty(0, dtype=torch.float16, device=device),
        factors=torch.ones(MOST_ROWS, dtype=torch.float32, device=device),
        panel=torch.empty(0, dtype=torch.float16, device=device),
    )
