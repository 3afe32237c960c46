"""Random matrices in the formats of real checkpoints, nothing quantized: codes and scales are drawn.

Weights have mean 0 and the standard deviation asked for, so that activations stay sane: codes never take their lowest
value, which leaves as many below the zero-point as above it. (A mean of half a step would give every matrix one huge
singular value.) Layouts: formats/exl2.md 2-4 and formats/gptq.md 1-4.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from exl_runtime.errors import UsageError
from exl_runtime.formats.bits import pack_columns, pack_rows
from exl_runtime.formats.exl2 import COLUMN_MULTIPLE, ROW_MULTIPLE
from exl_runtime.formats.exl2 import WIDTHS as EXL2_WIDTHS
from exl_runtime.formats.gptq import WIDTHS as GPTQ_WIDTHS

PIECE = 1 << 22  # weights drawn at a time
SCALE_CODES = (9, 16)  # EXL2 scale codes are drawn from these, both included
GROUP = 128
SLACK = 0.25  # bits: "2 bits" is what people call pure 2-bit codes, whatever lies around them
WIDE_SHARE = 1 / 16  # rows of an EXL2 matrix that get a wider code than the average asks for


def exl2_plan(inputs: int, outputs: int, bits: float, group: int, owed: float = 0.0) -> list[tuple[int, int]]:
    """(width, rows) of every group, widths non-increasing, that bring a matrix close to `bits` per weight.

    bits   average, with scales, group table and permutation
    owed   bits that earlier matrices fell short of (below 0: went beyond) and this one should make up for
    Some rows are wider than needed, as in real models. Raises UsageError for what no widths reach.
    """
    if group % ROW_MULTIPLE or group < ROW_MULTIPLE:
        raise UsageError(f"an EXL2 group of {group} rows", hint=f"give a multiple of {ROW_MULTIPLE}")
    sizes = [min(group, inputs - start) for start in range(0, inputs, group)]
    base = bits - overhead(inputs, outputs, len(sizes))
    low, high = min(EXL2_WIDTHS), max(EXL2_WIDTHS)
    if not low - SLACK <= base <= high:
        least, most = (width + overhead(inputs, outputs, len(sizes)) for width in (low, high))
        raise UsageError(f"{bits:g} bits per weight in EXL2", hint=f"from {least:.2f} to {most:.2f} are possible here")
    wanted = min(max(base + owed / (inputs * outputs), low), high)
    narrow = max(width for width in EXL2_WIDTHS if width <= wanted)
    wide = min((width for width in EXL2_WIDTHS if width > narrow), default=high)
    widest = min((width for width in EXL2_WIDTHS if width > wide), default=wide)
    left = wanted * inputs - narrow * inputs  # bits of a column to hand out beyond the narrow width
    widths = [narrow] * len(sizes)
    if left >= WIDE_SHARE * inputs * (widest - narrow):
        for index in range(max(1, round(WIDE_SHARE * len(sizes)))):
            if left >= sizes[index] * (widest - narrow):
                widths[index] = widest
                left -= sizes[index] * (widest - narrow)
    for index, rows in enumerate(sizes):
        if widths[index] != narrow:
            continue
        if left < rows * (wide - narrow) / 2:  # the nearest sum, not the nearest below
            break
        widths[index] = wide
        left -= rows * (wide - narrow)
    return list(zip(widths, sizes, strict=True))


def overhead(inputs: int, outputs: int, groups: int) -> float:
    """Bits per weight of everything but codes (formats/exl2.md 4.3)."""
    return (groups * (16 + 32 + 4 * outputs) + 32 * inputs) / (inputs * outputs)


def plan_bits(plan: list[tuple[int, int]], outputs: int) -> float:
    """Bits that a matrix of this plan takes on disk."""
    inputs = sum(rows for _, rows in plan)
    codes = sum(width * rows for width, rows in plan) * outputs
    return codes + overhead(inputs, outputs, len(plan)) * inputs * outputs


def exl2(plan: list[tuple[int, int]], outputs: int, std: float, seed: int, perm_seed: int) -> dict[str, Tensor]:
    """Tensors by suffix of one EXL2 matrix. Matrices of one `perm_seed` share the order of rows, as q, k and v do."""
    rng = np.random.default_rng(seed)
    padded = -(-outputs // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    low, high = SCALE_CODES
    # Mean square of (s / 16)^2 over the codes drawn.
    spread = math.sqrt(sum((s / 16) ** 4 for s in range(low, high + 1)) / (high - low + 1))
    words, maxima, table, row = [], [], [], 0
    for width, rows in plan:
        words.append(pack_rows(_codes(rng, rows, outputs, padded, width), width))
        maxima.append(std / (deviation(width) * spread))
        table += [width, row]
        row += rows * width // 32
    scales = torch.from_numpy(rng.integers(low - 1, high, size=(len(plan), padded), dtype=np.uint8))
    inputs = sum(rows for _, rows in plan)
    order = np.random.default_rng(perm_seed).permutation(inputs)
    return {
        "q_weight": torch.cat(words),
        "q_scale": pack_columns(scales, 4),
        "q_scale_max": torch.tensor(maxima, dtype=torch.float32).half(),
        # Offsets are unsigned: those above 32767 look negative.
        "q_groups": torch.from_numpy(np.array(table, dtype=np.uint16).view(np.int16)),
        "q_invperm": torch.from_numpy(order.astype(np.int32)),
    }


def gptq(
    inputs: int, outputs: int, std: float, seed: int, *, bits: int, group: int, act_order: bool, perm_seed: int
) -> dict[str, Tensor]:
    """Tensors by suffix of one symmetric GPTQ matrix, checkpoint format v1 (zero-points stored minus 1)."""
    check_gptq(bits, group)
    rng = np.random.default_rng(seed)
    size = inputs if group == -1 else group
    count = -(-inputs // size)
    step = std / deviation(bits)
    # Uniform between 0.5 and 1.5: mean square 13 / 12.
    scales = rng.random((count, outputs), dtype=np.float32) + 0.5
    group_of = np.arange(inputs) // size
    if act_order:
        group_of = np.random.default_rng(perm_seed).permutation(group_of)
    zeros = torch.full((count, outputs), (1 << (bits - 1)) - 1, dtype=torch.uint8)
    return {
        "qweight": pack_rows(_codes(rng, inputs, outputs, outputs, bits), bits),
        "qzeros": pack_columns(zeros, bits),
        "scales": torch.from_numpy(scales * step / math.sqrt(13 / 12)).half(),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }


def check_gptq(bits: float, group: int) -> None:
    """Raise UsageError for a width or group size that GPTQ does not have."""
    if bits not in GPTQ_WIDTHS:
        raise UsageError(f"{bits:g} bits per weight in GPTQ", hint=f"give one of {', '.join(map(str, GPTQ_WIDTHS))}")
    if group != -1 and group < 1:
        raise UsageError(f"a GPTQ group of {group} rows", hint="give a number from 1 up, or -1 for one group")


def dense_pieces(rows: int, columns: int, std: float, seed: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """A dense tensor (rows, columns), normally distributed, some rows at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, PIECE // columns)
    for start in range(0, rows, step):
        values = rng.standard_normal((min(step, rows - start), columns), dtype=np.float32)
        yield torch.from_numpy(values * np.float32(std)).to(dtype)


def deviation(bits: int) -> float:
    """Standard deviation of the codes drawn: uniform on -m .. m with m = 2^(bits-1) - 1."""
    top = (1 << (bits - 1)) - 1
    return math.sqrt(top * (top + 1) / 3)


def _codes(rng: np.random.Generator, rows: int, outputs: int, padded: int, bits: int) -> Tensor:
    """uint8 (rows, padded): 1 .. 2^bits - 1, and the code of zero in padding columns."""
    codes = rng.integers(1, 1 << bits, size=(rows, padded), dtype=np.uint8)
    codes[:, outputs:] = 1 << (bits - 1)
    return torch.from_numpy(codes)
