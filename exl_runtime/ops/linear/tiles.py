"""Repacks quantized matrices into the memory that the native CPU kernels read (ext/cpu/tiles.h).

Positions are the order in which a kernel meets the inputs: rows sorted by group, every group padded to whole units of
32.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from ...memory import empty_bytes
from .. import native

UNIT = 32  # positions that are decoded together
SPAN = 4  # units with one quantization scale of the input, at most


class Residual(IntEnum):
    """Up to how many rows of x the input keeps its 8-bit residual (ext/cpu/linear_packed.h); any number will do.

    With the residual a product is as good as in float32, without it an input has 8 bits and twice the speed where the
    processor, not the memory, is the limit.
    """

    NEVER = 0
    FEW = 8
    ALWAYS = 1 << 62


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive positions of one group."""

    bits: int
    positions: int  # a multiple of UNIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A matrix to be packed, N columns. The runs are its groups in order.

    words      int32 (W, >= N): a column's bit stream runs down the rows
    order      int32 (positions,): the stored row at each position, -1 for none; None: as they are
    rows       int32 (positions,): the input at each position, -1 for none; None: inputs in order
    scales     EXL2: int32 (G, >= N / 8), nibbles as stored; GPTQ: float16 (G, N)
    tables     EXL2: float32 (G, 16), the scale that each nibble means; None for GPTQ
    zeros      uint8 (G, N), to which zero_base is added; None: 2^(bits - 1) everywhere
    columns    int32 (N,): the column that becomes output n; None: columns in order
    take       bytes -> the buffer that the packed matrix lies in
    """

    inputs: int
    outputs: int
    runs: Sequence[Run]
    words: Tensor
    order: Tensor | None
    rows: Tensor | None
    scales: Tensor
    tables: Tensor | None = None
    zeros: Tensor | None = None
    zero_base: int = 0
    columns: Tensor | None = None
    take: Callable[[int], Tensor] = empty_bytes


def span_table(runs: Iterable[Run]) -> Tensor:
    """int32 (S, 3): bits, group and units of every span."""
    table = []
    for group, run in enumerate(runs):
        units = run.positions // UNIT
        table += [(run.bits, group, min(SPAN, units - start)) for start in range(0, units, SPAN)]
    return torch.tensor(table, dtype=torch.int32).view(-1, 3)


def pack(source: Source) -> Tensor:
    """uint8 (bytes,): everything the kernels need, in one piece of memory."""
    arguments = (
        source.words.contiguous(),
        span_table(source.runs),
        source.order,
        source.rows,
        source.scales.contiguous(),
        source.tables,
        source.zeros,
        source.zero_base,
        source.inputs,
        source.outputs,
    )
    packed = source.take(native.ops().pack_tiles(*arguments, None, source.columns))
    native.ops().pack_tiles(*arguments, packed, source.columns)
    return packed


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
