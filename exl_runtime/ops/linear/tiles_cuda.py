"""Brings quantized matrices into the form that the CUDA kernels read (ext/cuda/tile.h), on the card.

Positions are the order in which a kernel meets the inputs: rows sorted by group, every group padded to whole units of
32. What is made here does not depend on how the work is cut (`plan_cuda`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from .tiles import UNIT, Run

COLUMNS = 32  # of a tile
MOST_OUTPUTS = 65535 * COLUMNS


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaMatrix:
    """One matrix on the card. `blob` holds the addresses of the other tensors."""

    inputs: int
    outputs: int
    lines: tuple[int, ...]  # 128-byte lines of a tile column before every unit, and of all
    rows: Tensor | None  # int32 (positions,): the input at each position, -1 for none; None: inputs in order
    tiles: Tensor
    scales: Tensor
    units: Tensor
    maxima: Tensor | None
    blob: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes on the card."""
        held = (self.rows, self.tiles, self.scales, self.units, self.maxima)
        return sum(t.nbytes for t in held if t is not None)


def build(
    *,
    inputs: int,
    outputs: int,
    runs: Sequence[Run],
    words: Tensor,
    order: Tensor | None,
    rows: Tensor | None,
    scales: Tensor,
    maxima: Tensor | None = None,
    zeros: Tensor | None = None,
    zero_base: int = 0,
) -> CudaMatrix:
    """Repack on the device where the tensors are.

    words      int32 (W, >= N): a column's bit stream runs down the rows
    order      int32 (positions,): the stored row at each position, -1 for none; None: as they are
    rows       int32 (positions,): the input at each position, -1 for none; None: inputs in order
    scales     EXL2: uint8 (G, >= N), s - 1 of 0 to 15; GPTQ: float16 (G, N)
    maxima     EXL2: float16 (G,), M of formats/exl2.md 4; None for GPTQ
    zeros      uint8 (G, N), to which zero_base is added; None: 2^(bits - 1) everywhere
    """
    device = words.device
    ops = native.cuda_ops(device)
    widths = [run.bits for run in runs for _ in range(run.positions // UNIT)]
    groups = [group for group, run in enumerate(runs) for _ in range(run.positions // UNIT)]
    lines = tuple(accumulate(widths, initial=0))
    table = [[line, bits | group << 8] for line, bits, group in zip(lines, widths, groups, strict=False)]
    units = torch.tensor(table, dtype=torch.int32).view(-1, 2).to(device)
    columns = -(-outputs // COLUMNS)
    tiles = ops.linear_repack(words.contiguous(), order, units, columns, lines[-1])
    if maxima is not None:
        records, kind = nibble_records(scales, columns), 0
    else:
        records, kind = half_records(scales, zeros, columns), 1 if zeros is None else 2
    widest = max(widths, default=2)
    blob = ops.linear_matrix(tiles, records, units, maxima, kind, zero_base, widest, outputs)
    return CudaMatrix(
        inputs=inputs,
        outputs=outputs,
        lines=lines,
        rows=rows,
        tiles=tiles,
        scales=records,
        units=units,
        maxima=maxima,
        blob=blob,
    )


def nibble_records(codes: Tensor, columns: int) -> Tensor:
    """uint8 (columns, G, 16): 8 halfwords per tile column and group, of four nibbles. codes: uint8 (G, >= N)."""
    by_entry = _entries(codes.to(torch.int32), columns)
    nibbles = by_entry << torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=codes.device)
    words = nibbles.sum(-1, dtype=torch.int32)
    return torch.stack([words & 255, words >> 8], dim=-1).to(torch.uint8).flatten(2)


def half_records(scales: Tensor, zeros: Tensor | None, columns: int) -> Tensor:
    """uint8 (columns, G, 64 or 96): 8 x 4 halves per tile column and group, then as many bytes of zero-points."""
    halves = _entries(scales, columns).contiguous().view(torch.uint8).flatten(2)
    if zeros is None:
        return halves
    return torch.cat([halves, _entries(zeros, columns).flatten(2)], dim=2).contiguous()


def _entries(values: Tensor, columns: int) -> Tensor:
    """(G, >= N) -> (columns, G, 8, 4): entry (g, i) is column 8 i + g of the tile; 0 past the last."""
    groups, width = columns * COLUMNS, values.shape[1]
    values = values[:, :groups] if width >= groups else F.pad(values, (0, groups - width))
    return values.reshape(values.shape[0], columns, 4, 8).permute(1, 0, 3, 2)
