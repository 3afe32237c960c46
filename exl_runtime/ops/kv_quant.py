"""Quantized keys and values: what the bytes of a quantized cache mean. Plain torch, slow and obvious, any device.

A head of `head_dim` values is rotated, cut into groups of 32, and stored as one row of bytes: a scale for every group,
then the codes. The grid and the rotation are those of exllamav3 (formats/kv_cache_quant.md 2): a Hadamard transform
spreads an outlier over its block, and 2^bits levels lie at the midpoints of equal intervals between -max and max.

rotation  Blocks of 32 values; what is left of head_dim in blocks of a power of two, largest first: 80 = 32 + 32 + 16,
          120 = 32 + 32 + 32 + 16 + 8, 33 = 32 + 1. Each is multiplied by the Hadamard matrix of its size in natural
          order over sqrt(size), which is its own inverse. Keys stay rotated: with a rotated query all products are
          the same. Values stay rotated too, and the mixture of them is turned back.
groups    32 values share a scale; the last group may be shorter.
row       groups halves (scales), then ceil(head_dim / 16) steps of 16 codes, 2 * bits bytes each; codes past head_dim
          are 0. A step is made of planes, of the powers of two in `bits`, largest first; the first holds the highest
          bits (7 = 4 + 2 + 1). A plane of width w takes 2 * w bytes. As one little-endian number of 16 * w bits:

            w = 8, 2, 1   code j at bit w * j
            w = 4         code j at bit 4 * (j // 2) + 32 * (j % 2): even codes in the first four bytes, odd codes in
                          the last four, so that one 64-bit word and one shift for each lane separate them

The native kernels (ext/cpu/kv_quant.h) agree with `quantize` to the bit.
"""

import math

import torch
from torch import Tensor

GROUP = 32  # values of one scale, and of one block of the rotation
STEP = 16  # codes
BITS = range(2, 9)  # widths of a code
LEAST = 1e-10  # keeps the division of an all-zero group finite


def groups_of(head_dim: int) -> int:
    """Scales of one head."""
    return -(-head_dim // GROUP)


def row_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one quantized head."""
    return 2 * groups_of(head_dim) + 2 * bits * -(-head_dim // STEP)


def bits_of(pages: Tensor, head_dim: int) -> int:
    """The width of the codes in uint8 pages (..., row_bytes). Raises ValueError when no width fits."""
    for bits in BITS:
        if pages.shape[-1] == row_bytes(head_dim, bits):
            return bits
    raise ValueError(f"rows of {pages.shape[-1]} bytes hold no quantized head of {head_dim} values")


def blocks_of(head_dim: int) -> list[tuple[int, int]]:
    """(first value, size) of every block of the rotation."""
    blocks = [(start, GROUP) for start in range(0, head_dim - head_dim % GROUP, GROUP)]
    start = head_dim - head_dim % GROUP
    while start < head_dim:
        size = 1 << ((head_dim - start).bit_length() - 1)
        blocks.append((start, size))
        start += size
    return blocks


def rotate(x: Tensor) -> Tensor:
    """x (..., head_dim) -> float32, every block times its normalised Hadamard matrix. Its own inverse."""
    return _transform(x.float(), normalise=True)


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x (..., head_dim) -> codes uint8 (..., head_dim) and scales float16 (..., groups) of the rotated values."""
    rotated = rotate(x)
    middle = float(1 << bits - 1)
    codes, scales = [], []
    for group in rotated.split(GROUP, dim=-1):
        scale = group.abs().amax(-1, keepdim=True) + LEAST
        level = torch.floor(group * (1.0 / scale) * middle + middle)
        codes.append(level.nan_to_num(0.0).clamp(0, 2 * middle - 1).to(torch.uint8))
        scales.append(scale.half())
    return torch.cat(codes, -1), torch.cat(scales, -1)


def decode(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes and scales of `encode` -> the values they stand for, rotated back, float32 (..., head_dim)."""
    head_dim = codes.shape[-1]
    middle = float(1 << bits - 1)
    norms = torch.cat([torch.full((size,), 1.0 / math.sqrt(size)) for _, size in blocks_of(head_dim)])
    wide = scales.float().repeat_interleave(GROUP, dim=-1)[..., :head_dim]
    values = (codes.float() - (middle - 0.5)) * (wide * norms.to(codes.device) / middle)
    return _transform(values, normalise=False)


def pack(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes and scales of `encode` -> rows uint8 (..., row_bytes), the layout above."""
    steps = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % STEP)).unflatten(-1, (-1, STEP)).long()
    planes, below = [], bits
    for width in _planes(bits):
        below -= width
        field = steps >> below & (1 << width) - 1
        positions = _positions(width, codes.device)
        flags = torch.zeros(*field.shape[:-1], STEP * width, dtype=torch.long, device=codes.device)
        for bit in range(width):
            flags[..., positions + bit] = field >> bit & 1
        weights = 1 << torch.arange(8, device=codes.device)
        planes.append((flags.unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8))
    return torch.cat([scales.contiguous().view(torch.uint8), torch.cat(planes, -1).flatten(-2)], -1)


def unpack(rows: Tensor, head_dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`."""
    groups = groups_of(head_dim)
    scales = rows[..., : 2 * groups].contiguous().view(torch.float16)
    steps = rows[..., 2 * groups :].unflatten(-1, (-1, 2 * bits)).long()
    codes = torch.zeros(*steps.shape[:-1], STEP, dtype=torch.long, device=rows.device)
    start, below = 0, bits
    for width in _planes(bits):
        below -= width
        plane = steps[..., start : start + 2 * width]
        start += 2 * width
        positions = _positions(width, rows.device)
        for bit in range(width):
            where = positions + bit
            codes |= (plane[..., where // 8] >> where % 8 & 1) << below + bit
    return codes.flatten(-2)[..., :head_dim].to(torch.uint8), scales


def quantize(x: Tensor, bits: int) -> Tensor:
    """x (..., head_dim), any float -> rows uint8 (..., row_bytes). NaN stays NaN: it becomes a scale."""
    return pack(*encode(x, bits), bits)


def dequantize(rows: Tensor, head_dim: int, bits: int) -> Tensor:
    """rows uint8 (..., row_bytes) -> float32 (..., head_dim), in the model's own basis."""
    return decode(*unpack(rows, head_dim, bits), bits)


def _planes(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def _positions(width: int, device: torch.device) -> Tensor:
    """The lowest bit of each of the 16 codes in a plane."""
    code = torch.arange(STEP, device=device)
    return code // 2 * 4 + code % 2 * 32 if width == 4 else code * width


def _transform(x: Tensor, *, normalise: bool) -> Tensor:
    parts = []
    for start, size in blocks_of(x.shape[-1]):
        block = x[..., start : start + size]
        span = 1
        while span < size:  # a butterfly: sums and differences of values `span` apart
            pairs = block.unflatten(-1, (-1, 2, span))
            low, high = pairs[..., 0, :], pairs[..., 1, :]
            block = torch.stack((low + high, low - high), -2).flatten(-3)
            span *= 2
        parts.append(block * (1.0 / math.sqrt(size)) if normalise else block)
    return torch.cat(parts, -1)
