"""Repacks quantized matrices into the tiles the native CPU kernels read (ext/cpu/linear.h). Pure torch, no kernels.

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

STEP = 16  # codes of one column decoded together: 2 * bits whole bytes
TILE = 4  # columns side by side
BLOCK = 512  # kBlock: inputs summed before the lanes are added up
PADDING = 16  # spare bytes at both ends, so that a kernel may load whole registers
PIECE = 1 << 22  # codes rearranged at a time: bounds the temporaries


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


def streams(words: Tensor) -> Tensor:
    """uint8 (N, 4 * W): the bit stream of every column of int32 words (W, N), as bytes."""
    return words.t().contiguous().view(torch.uint8)


def unpack(stream: Tensor, bits: int) -> Tensor:
    """uint8 (N, codes) from streams uint8 (N, bytes); 8 codes are `bits` bytes."""
    groups = stream.view(stream.shape[0], -1, bits)
    codes = torch.empty(*groups.shape[:2], 8, dtype=torch.uint8)
    mask = (1 << bits) - 1
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        code = groups[..., byte] >> offset
        if offset + bits > 8:
            code = code | (groups[..., byte + 1] << (8 - offset))
        codes[..., i] = code & mask
    return codes.view(stream.shape[0], -1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`; the number of codes is a multiple of 8."""
    groups = codes.view(codes.shape[0], -1, 8)
    stream = torch.zeros(*groups.shape[:2], bits, dtype=torch.uint8)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        stream[..., byte] |= groups[..., i] << offset
        if offset + bits > 8:
            stream[..., byte + 1] |= groups[..., i] >> (8 - offset)
    return stream.view(codes.shape[0], -1)


def permute_codes(stream: Tensor, bits: int, order: Tensor) -> Tensor:
    """Streams of codes `order[0], order[1], ...` of every column; -1 stands for code 0.

    stream: uint8 (N, bytes); order: int64 (positions,), a multiple of STEP long.
    """
    out = torch.empty(stream.shape[0], order.numel() * bits // 8, dtype=torch.uint8)
    columns = max(1, PIECE // max(order.numel(), 1))
    index, padding = order.clamp(min=0), order < 0
    for start in range(0, stream.shape[0], columns):
        codes = unpack(stream[start : start + columns], bits)[:, index]
        codes[:, padding] = 0
        out[start : start + columns] = pack(codes, bits)
    return out


class CodeTiles:
    """Fills the `codes` buffer region by region: all positions of one width at a time."""

    def __init__(self, outputs: int, tile_bytes: int) -> None:
        self._tiles = -(-outputs // TILE)
        self.buffer = torch.zeros(2 * PADDING + self._tiles * tile_bytes, dtype=torch.uint8)
        self._tile_rows = self.buffer[PADDING : PADDING + self._tiles * tile_bytes].view(self._tiles, tile_bytes)
        self._filled = 0  # bytes of every tile

    def append(self, stream: Tensor, bits: int) -> None:
        """Add the next positions of all columns: uint8 (outputs, steps * 2 * bits)."""
        step_bytes = 2 * bits
        steps = stream.shape[1] // step_bytes
        stream = pad_columns(stream)
        pieces = stream.view(self._tiles, TILE, steps, step_bytes)
        end = self._filled + steps * TILE * step_bytes
        room = self._tile_rows[:, self._filled : end].unflatten(1, (steps, TILE, step_bytes))
        room.copy_(pieces.transpose(1, 2))
        self._filled = end


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
    from .. import native

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
