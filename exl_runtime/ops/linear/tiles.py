"""Repacks quantized matrices into the tiles the native CPU kernels read (ext/cpu/linear.h).

A column's codes stay the bit stream they are on disk; only its pieces move. Positions are the order in which a kernel
meets the inputs: rows sorted by group, every group padded to whole steps of 16, and inside a step in lane order.

    codes  uint8   16 spare bytes, then [tile of 4 columns][step][column in tile][2 * bits bytes], then 16 spare bytes
    spans  int32   (S, 3): bits, group, steps; never across a multiple of `BLOCK` positions
    rows   int32   (positions,): which input stands there, -1 for padding
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory import empty_bytes
from .. import native

STEP = 16  # codes of one column decoded together: 2 * bits whole bytes
TILE = 4  # columns side by side
BLOCK = 512  # kBlock: inputs summed before the lanes are added up
PADDING = 16  # spare bytes at both ends, so that a kernel may load whole registers


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive positions of one group."""

    bits: int
    group: int
    positions: int  # a multiple of STEP


def span_table(runs: Iterable[Run]) -> Tensor:
    """int32 (S, 3): the runs, cut where a block ends."""
    table, position = [], 0
    for run in runs:
        end = position + run.positions
        while position < end:
            stop = min(end, position // BLOCK * BLOCK + BLOCK)
            table.append((run.bits, run.group, (stop - position) // STEP))
            position = stop
    return torch.tensor(table, dtype=torch.int32).view(-1, 3)


def lane_order(bits: int) -> list[int]:
    """Which code of a step each of the 16 lanes receives: `lane_code` of ext/common/bitstream.h."""
    if bits in (3, 4):
        return [lane % 2 * 8 + lane // 2 for lane in range(STEP)]
    return list(range(STEP))


def row_table(rows: Tensor, runs: Iterable[Run]) -> Tensor:
    """int32 (positions,): `rows`, given in stream order, rearranged to lane order in every step."""
    pieces, start = [], 0
    for run in runs:
        piece = rows[start : start + run.positions].view(-1, STEP)
        pieces.append(piece[:, lane_order(run.bits)].reshape(-1))
        start += run.positions
    return torch.cat(pieces).to(torch.int32) if pieces else rows.new_zeros(0, dtype=torch.int32)


class CodeTiles:
    """Fills the `codes` buffer region by region: all positions of one width at a time."""

    def __init__(self, outputs: int, tile_bytes: int) -> None:
        size = -(-outputs // TILE) * tile_bytes
        self.buffer = empty_bytes(2 * PADDING + size)
        self.buffer[:PADDING] = 0
        self.buffer[PADDING + size :] = 0
        self._outputs = outputs
        self._filled = 0  # bytes of every tile

    def append(self, words: Tensor, bits: int, order: Tensor | None = None) -> None:
        """Add the next positions of all columns.

        words  int32 (W, N), N at least `outputs`: a column's bit stream runs down the rows
        order  int32 (positions,), a multiple of STEP long: the rows' new places, -1 for code 0; None: as they are
        """
        native.ops().fill_tiles(words.contiguous(), order, self.buffer, bits, self._outputs, self._filled)
        positions = words.shape[0] * 32 // bits if order is None else order.numel()
        self._filled += positions // STEP * TILE * 2 * bits


def pad_columns(rows: Tensor) -> Tensor:
    """(N, ...) with N padded to whole tiles by zeros."""
    missing = -rows.shape[0] % TILE
    if not missing:
        return rows
    return F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, missing])


def tile_by_group(values: Tensor) -> Tensor:
    """(tiles, G, TILE) from per-group values (G, N): what a tile needs lies together."""
    return pad_columns(values.t().contiguous()).view(-1, TILE, values.shape[0]).transpose(1, 2).contiguous()


def native_refusal(device: torch.device) -> str | None:
    """Why no native CPU kernel can run on `device`, or None."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device}"
    why = native.available()
    return None if why is None else f"the native library is unavailable: {why}"


def like_input(y: Tensor, x: Tensor) -> Tensor:
    """The kernel's float32 (rows, N) with the dtype and the leading dimensions of x."""
    if x.dim() == 2 and x.dtype == torch.float32:
        return y
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def flat_float(x: Tensor) -> Tensor:
    """x (..., K) as contiguous float32 (rows, K)."""
    if x.dim() == 2 and x.dtype == torch.float32:  # the common case, once per matrix and token: no detours
        return x.contiguous()
    flat = x.reshape(-1, x.shape[-1])
    if flat.dtype != torch.float32:
        flat = flat.float()
    return flat.contiguous()
