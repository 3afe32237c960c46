"""GPTQ: affine codes in the model's row order, one scale and zero-point per group and column (formats/gptq.md).

Knows no kernels. Notation: K = in_features, N = out_features, G = number of groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import FormatError, NonFiniteError
from .base import LinearShape, QuantFormat
from .bits import (
    BLOCK_CODES,
    pack_rows,
    to_int32,
    unpack_columns,
    unpack_planar_columns,
    unpack_planar_rows,
    unpack_rows,
)
from .checks import DAMAGED, HALF_LIMIT, require, require_finite, require_shape
from .hints import GptqHints

WIDTHS = (2, 3, 4, 8)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in every field of a word
PIECE = 1 << 21  # weights dequantized at a time: bounds the temporaries


@dataclass(frozen=True, kw_only=True, eq=False)
class Gptq(QuantFormat):
    """One GPTQ matrix, normalised so that its variants look alike: zero-points decoded, rows assigned to groups.

    W[i, n] = round_to_half((code[i, n] - zeros[g, n]) * scales[g, n]),  g = row_group[i]
    """

    name: ClassVar[str] = "gptq"
    marker: ClassVar[str] = "qweight"

    shape: LinearShape
    bits: int  # 2, 3, 4 or 8
    qweight: Tensor  # int32 (K * bits / 32, N), one bit stream per column, see `bits.unpack_rows`
    zeros: Tensor  # int16 (G, N): the effective zero-points, 0 .. 2^bits
    scales: Tensor  # float16 (G, N)
    row_group: Tensor  # int32 (K,): group of every row
    group_size: int | None  # rows i // group_size form the groups; None: activation order, see row_group
    scale_bits: int  # of one scale on disk: 16 or 32
    index_bits: int  # of g_idx on disk, 0 without one

    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], shape: LinearShape, *, where: str = "matrix", hints: GptqHints | None = None
    ) -> Self:
        """See the base class. Bit width and group count come from the tensors, how to read zero-points from `hints`."""
        hints = hints or GptqHints()
        inputs, outputs = shape.in_features, shape.out_features
        qweight = require(tensors, "qweight", where, 2, torch.int32)
        qzeros = require(tensors, "qzeros", where, 2, torch.int32)
        stored_scales = require(tensors, "scales", where, 2, torch.float16, torch.bfloat16, torch.float32)
        bits = _bits(qweight, shape, where)
        count = stored_scales.shape[0]
        if not 1 <= count <= inputs:
            raise FormatError(f"{where}: scales has {count} groups for {inputs} input features", hint=DAMAGED)
        columns = f"{outputs} output features"
        require_shape(stored_scales, "scales", where, count, outputs, because=columns)
        wide = -(-outputs * bits // 32)
        require_shape(qzeros, "qzeros", where, count, wide, because=f"{count} groups, {columns} of {bits} bits")
        largest = require_finite(stored_scales, "scales", where)
        scales = stored_scales.half()
        if scales.dtype != stored_scales.dtype:
            largest = require_finite(scales, "scales (rounded to half)", where)

        if hints.layout == "gptq_p" and bits == 3:
            # Only here do bit planes differ from the bit stream; one layout is enough for every kernel.
            qweight = pack_rows(unpack_planar_rows(qweight, bits), bits)
        row_group, group_size = _assign_rows(tensors, inputs, count, hints, where)
        matrix = cls(
            shape=shape,
            bits=bits,
            qweight=qweight,
            zeros=read_zeros(qzeros, bits, outputs, hints),
            scales=scales,
            row_group=row_group,
            group_size=group_size,
            scale_bits=8 * stored_scales.element_size(),
            index_bits=8 * tensors["g_idx"].element_size() * inputs if "g_idx" in tensors else 0,
        )
        matrix._require_finite_weights(largest, where)
        return matrix

    @classmethod
    def infer_shape(cls, tensors: Mapping[str, Tensor], *, where: str) -> LinearShape:
        """The shape that the tensors have by themselves; FormatError where two bit widths would fit."""
        qweight = require(tensors, "qweight", where, 2, torch.int32)
        words, outputs = qweight.shape
        if "g_idx" in tensors:
            return LinearShape(require(tensors, "g_idx", where, 1, torch.int32, torch.int64).numel(), outputs)
        wide = require(tensors, "qzeros", where, 2, torch.int32).shape[1]
        fitting = [bits for bits in WIDTHS if -(-outputs * bits // 32) == wide and words * 32 % bits == 0]
        if len(fitting) != 1:
            raise FormatError(
                f"{where}: qweight {tuple(qweight.shape)} with qzeros of {wide} columns fits "
                f"{' or '.join(map(str, fitting)) or 'no'} bits, and there is no g_idx to tell the number of rows"
            )
        return LinearShape(words * 32 // fitting[0], outputs)

    def dequantize(self) -> Tensor:
        """(K, N) float32, every value a half: the exact integer difference times the scale, rounded once."""
        inputs, outputs = self.shape.in_features, self.shape.out_features
        weight = torch.empty(inputs, outputs, device=self.qweight.device)
        zeros, scales = self.zeros.float(), self.scales.float()
        block = BLOCK_CODES[self.bits]
        step = max(block, PIECE // max(outputs, 1) // block * block)
        for start in range(0, inputs, step):
            stop = min(start + step, inputs)
            words = self.qweight[start * self.bits // 32 : stop * self.bits // 32]
            piece = unpack_rows(words, self.bits, torch.float32)
            groups = self.row_group[start:stop].long()
            weight[start:stop] = piece.sub_(zeros[groups]).mul_(scales[groups]).half()
        return weight

    def columns(self, start: int, stop: int) -> Self:
        """See the base class; any bounds, as zero-points are held unpacked."""
        return replace(
            self,
            shape=LinearShape(self.shape.in_features, stop - start),
            qweight=self.qweight[:, start:stop].contiguous(),
            zeros=self.zeros[:, start:stop].contiguous(),
            scales=self.scales[:, start:stop].contiguous(),
        )

    def storage_bits(self) -> int:
        """See the base class: codes, packed zero-points, scales and g_idx, without the bias."""
        words = self.qweight.numel() + self.zeros.shape[0] * -(-self.shape.out_features * self.bits // 32)
        return 32 * words + self.scale_bits * self.scales.numel() + self.index_bits

    def _require_finite_weights(self, largest_scale: float, where: str) -> None:
        """Finite scales can still overflow a weight; look at the weights only where that is possible."""
        if largest_scale * (1 << self.bits) < HALF_LIMIT:
            return
        if not self.dequantize().isfinite().all():
            raise NonFiniteError(f"{where}: scales is so large that weights overflow half precision", hint=DAMAGED)


def read_zeros(qzeros: Tensor, bits: int, outputs: int, hints: GptqHints) -> Tensor:
    """Effective zero-points, int16 (G, N), from packed int32 (G, W): sections 3, 3.1 and 3.2.

    v2 stores the zero-point. v1 stores it minus 1, which cannot express 0: the writer that subtracted word by word is
    undone word by word, any other field by field (all ones then means 2^bits).
    """
    if hints.layout == "gptq_p":
        return unpack_planar_columns(qzeros, bits, outputs).to(torch.int16)
    stored = unpack_columns(qzeros, bits, outputs, torch.int16)
    if hints.layout == "gptq_v2":
        version = 2
    else:
        version = 1
    if hints.sym is not False and stored.numel():
        # Symmetric files are sometimes labelled wrongly; their fields give the version away. (sym defaults to true.)
        low, high = (int(bound) for bound in torch.aminmax(stored))
        middle = 1 << (bits - 1)
        if low == high == middle:
            version = 2
        elif low == high == middle - 1:
            version = 1
    if version == 2:
        return stored
    if not hints.carry and hints.sym is not False:
        return stored + 1
    if bits == 3:
        return (stored + 1) % 8
    return unpack_columns(to_int32(qzeros.to(torch.int64) + ONES[bits]), bits, outputs, torch.int16)


def _bits(qweight: Tensor, shape: LinearShape, where: str) -> int:
    """Bit width from the shape of qweight; FormatError when it is not one GPTQ has."""
    words, columns = qweight.shape
    inputs, outputs = shape.in_features, shape.out_features
    if words == inputs and columns * 8 == outputs:
        raise FormatError(
            f"{where}: qweight has shape {tuple(qweight.shape)} for {inputs} x {outputs} weights: "
            "packed along columns, as AWQ does",
            hint="look for a GPTQ or EXL2 version of the model",
        )
    bits, rest = divmod(words * 32, inputs)
    if rest or bits not in WIDTHS:
        legal = ", ".join(f"{inputs * width // 32} ({width} bit)" for width in WIDTHS)
        raise FormatError(
            f"{where}: qweight has {words} rows for {inputs} input features, wanted one of {legal}", hint=DAMAGED
        )
    if words % (BLOCK_CODES[bits] * bits // 32):
        raise FormatError(f"{where}: {inputs} input features are not a multiple of {BLOCK_CODES[bits]} at {bits} bits")
    require_shape(qweight, "qweight", where, words, outputs, because=f"{outputs} output features")
    return bits


def _assign_rows(
    tensors: Mapping[str, Tensor], inputs: int, count: int, hints: GptqHints, where: str
) -> tuple[Tensor, int | None]:
    """(group of every row int32 (K,), group size if the groups are consecutive rows): section 4."""
    index = None
    if "g_idx" in tensors:
        index = require(tensors, "g_idx", where, 1, torch.int32, torch.int64)
        require_shape(index, "g_idx", where, inputs, because=f"{inputs} input features")
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < -count or high >= count:
            wrong = high if high >= count else low
            raise FormatError(f"{where}: g_idx holds {wrong}, wanted groups 0 to {count - 1}", hint=DAMAGED)
        if count > 1 and low == high == 0:
            index = None  # all zero: consecutive groups, written by a program that did not fill it in
        else:
            index = torch.where(index < 0, index + count, index).to(torch.int32)  # negative: counted from the end
    if index is None:
        size = _group_size(inputs, count, hints, where)
        rows = torch.arange(inputs, dtype=torch.int32, device=tensors["qweight"].device)
        return rows // size, size
    for size in _candidate_sizes(inputs, count, hints):
        if torch.equal(index, torch.arange(inputs, dtype=torch.int32, device=index.device) // size):
            return index, size
    return index, None


def _candidate_sizes(inputs: int, count: int, hints: GptqHints) -> list[int]:
    """Group sizes that give `count` groups, most trustworthy first: declared, power of two, even division."""
    declared = inputs if hints.group_size == -1 else hints.group_size
    even = inputs // count if inputs % count == 0 else None
    power = 1 << (-(-inputs // count) - 1).bit_length()
    return [size for size in (declared, power, even) if size and -(-inputs // size) == count]


def _group_size(inputs: int, count: int, hints: GptqHints, where: str) -> int:
    sizes = _candidate_sizes(inputs, count, hints)
    if not sizes:
        raise FormatError(
            f"{where}: {count} groups over {inputs} rows fit no group size (declared: {hints.group_size}), "
            "and g_idx does not say which row belongs to which",
            hint="set group_size in quantize_config.json to the one the model was made with",
        )
    return sizes[0]
