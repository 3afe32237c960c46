"""EXL2: rows sorted by importance, groups of rows with 2 to 8 bits each, 4-bit scale codes (formats/exl2.md 2-4).

Knows no kernels. Notation: K = in_features, N = out_features, Np = N rounded up to 32, G = number of groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import FormatError, NonFiniteError
from .base import LinearShape, QuantFormat
from .bits import pack_columns, pack_rows, unpack_columns, unpack_rows
from .checks import DAMAGED, HALF_LIMIT, require, require_finite, require_shape

WIDTHS = (8, 6, 5, 4, 3, 2)
ROW_MULTIPLE = 32  # rows of a group
COLUMN_MULTIPLE = 32  # stored columns
PIECE = 1 << 21  # weights dequantized at a time: bounds the temporaries


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive stored rows that share a bit width and a scale row."""

    bits: int
    first_word_row: int  # of q_weight
    word_rows: int
    first_row: int  # of the stored (permuted) matrix
    rows: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Exl2(QuantFormat):
    """One EXL2 matrix, tensors as stored. Stored row `q_invperm[i]` is row i of the model."""

    name: ClassVar[str] = "exl2"
    marker: ClassVar[str] = "q_weight"

    shape: LinearShape
    q_weight: Tensor  # int32 (R, Np): every group's codes as one bit stream per column, see `bits.unpack_rows`
    q_scale: Tensor  # int32 (G, Np / 8): nibble n % 8 of word n / 8 is the scale code of column n, minus 1
    q_scale_max: Tensor  # float16 (G,)
    q_invperm: Tensor | None  # int32 (K,); None: rows lie in the model's order
    groups: tuple[Group, ...]  # non-increasing bits

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: LinearShape, *, where: str = "matrix") -> Self:
        """See the base class. All checks of formats/exl2.md 4.2; a stored `q_perm` is ignored as redundant."""
        q_weight = require(tensors, "q_weight", where, 2, torch.int32)
        q_scale = require(tensors, "q_scale", where, 2, torch.int32)
        q_scale_max = require(tensors, "q_scale_max", where, 1, torch.float16)
        groups = read_groups(require(tensors, "q_groups", where, 1, torch.int16), q_weight.shape[0], where)

        rows = sum(group.rows for group in groups)
        if rows != shape.in_features:
            raise FormatError(
                f"{where}: q_groups and q_weight hold {rows} rows, the model wants {shape.in_features} input features",
                hint="config.json and the weights are from different models",
            )
        padded = -(-shape.out_features // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        outputs = f"{shape.out_features} output features, padded to a multiple of {COLUMN_MULTIPLE}"
        require_shape(q_weight, "q_weight", where, q_weight.shape[0], padded, because=outputs)
        require_shape(q_scale, "q_scale", where, len(groups), padded // 8, because=f"{len(groups)} groups, {outputs}")
        require_shape(q_scale_max, "q_scale_max", where, len(groups), because=f"{len(groups)} groups")
        require_finite(q_scale_max, "q_scale_max", where)

        q_invperm = None
        if "q_invperm" in tensors:
            q_invperm = require(tensors, "q_invperm", where, 1, torch.int32)
            require_shape(q_invperm, "q_invperm", where, rows, because=f"{rows} input features")
            require_permutation(q_invperm, where)

        matrix = cls(
            shape=shape,
            q_weight=q_weight,
            q_scale=q_scale,
            q_scale_max=q_scale_max,
            q_invperm=q_invperm,
            groups=groups,
        )
        matrix._require_finite_weights(where)
        return matrix

    @classmethod
    def infer_shape(cls, tensors: Mapping[str, Tensor], *, where: str) -> LinearShape:
        """The shape that the tensors have by themselves, padding columns included."""
        q_weight = require(tensors, "q_weight", where, 2, torch.int32)
        groups = read_groups(require(tensors, "q_groups", where, 1, torch.int16), q_weight.shape[0], where)
        return LinearShape(sum(group.rows for group in groups), q_weight.shape[1])

    def dequantize(self) -> Tensor:
        """(K, N) float32, every value a half. Three roundings to half: `group_scales`, `scales`, the product."""
        inputs, outputs = self.shape.in_features, self.shape.out_features
        weight = torch.empty(inputs, outputs, device=self.q_weight.device)
        order = self.perm
        scales = self.scales()
        step = max(ROW_MULTIPLE, PIECE // max(outputs, 1) // ROW_MULTIPLE * ROW_MULTIPLE)
        for index, group in enumerate(self.groups):
            for start in range(0, group.rows, step):
                rows = min(step, group.rows - start)
                first = group.first_word_row + start * group.bits // 32
                words = self.q_weight[first : first + rows * group.bits // 32, :outputs]
                piece = unpack_rows(words, group.bits, torch.float32)
                # Both factors are halves, so their float32 product is exact and .half() rounds once.
                piece.sub_(1 << (group.bits - 1)).mul_(scales[index, :outputs])
                piece = piece.half()
                place = slice(group.first_row + start, group.first_row + start + rows)
                weight[place if order is None else order[place]] = piece.float()
        return weight

    def columns(self, start: int, stop: int) -> Self:
        """See the base class. Columns are repacked: scale codes share words, and the count is padded to 32 again."""
        pad = -(stop - start) % COLUMN_MULTIPLE
        words = self.q_weight[:, start:stop]
        nibbles = unpack_columns(self.q_scale, 4, self.q_weight.shape[1])[:, start:stop]
        if pad:
            # A padding column holds the code of zero everywhere, as the converter writes it.
            zeros = [pack_rows(torch.full((g.rows, 1), 1 << (g.bits - 1)), g.bits) for g in self.groups]
            filler = torch.cat(zeros).to(words.device)
            words = torch.cat([words, filler.expand(-1, pad)], dim=1)
            nibbles = torch.cat([nibbles, nibbles.new_zeros(len(self.groups), pad)], dim=1)
        return type(self)(
            shape=LinearShape(self.shape.in_features, stop - start),
            q_weight=words.contiguous(),
            q_scale=pack_columns(nibbles, 4),
            q_scale_max=self.q_scale_max,
            q_invperm=self.q_invperm,
            groups=self.groups,
        )

    def storage_bits(self) -> int:
        """See the base class; formats/exl2.md 4.3 without the bias."""
        bits = 32 * (self.q_weight.numel() + self.q_scale.numel()) + 16 * self.q_scale_max.numel()
        bits += 32 * len(self.groups)
        return bits + (0 if self.q_invperm is None else 32 * self.q_invperm.numel())

    @cached_property
    def perm(self) -> Tensor | None:
        """int64 (K,): the model row that stored row k holds (y = x[..., perm] @ stored); None: the same row."""
        return None if self.q_invperm is None else torch.argsort(self.q_invperm)

    def group_scales(self) -> Tensor:
        """float16 (G,): M = round(q_scale_max / 256); often subnormal."""
        return (self.q_scale_max.float() * (1.0 / 256.0)).half()

    def scale_codes(self) -> Tensor:
        """uint8 (G, Np): s in 1 .. 16."""
        return unpack_columns(self.q_scale, 4, self.q_weight.shape[1]) + 1

    def scales(self) -> Tensor:
        """float32 (G, Np), every value a half: S = round(s * s * M)."""
        codes = self.scale_codes().float()
        return (codes * codes * self.group_scales().float()[:, None]).half().float()

    def _require_finite_weights(self, where: str) -> None:
        """Finite scales can still overflow a weight; look at the weights only where that is possible."""
        widest = self.groups[0].bits
        if float(self.q_scale_max.float().abs().max()) * (1 << (widest - 1)) < HALF_LIMIT / 2:
            return
        scales = self.scales()
        if not (scales.isfinite().all() and self.dequantize().isfinite().all()):
            raise NonFiniteError(f"{where}: q_scale_max is so large that weights overflow half precision", hint=DAMAGED)


def read_groups(q_groups: Tensor, word_rows: int, where: str) -> tuple[Group, ...]:
    """Decode and check the group table: int16 (2G,) read as uint16, pairs (bits, first row in q_weight).

    word_rows: rows of q_weight, where the last group ends. Raises FormatError naming what is wrong.
    """
    values = [value & 0xFFFF for value in q_groups.tolist()]
    if not values or len(values) % 2:
        raise FormatError(f"{where}: q_groups has {len(values)} entries, wanted pairs (bits, first row)", hint=DAMAGED)
    widths, starts = values[0::2], values[1::2]
    if starts[0] != 0:
        raise FormatError(f"{where}: q_groups starts at row {starts[0]} of q_weight, wanted 0", hint=DAMAGED)
    groups: list[Group] = []
    first_row = 0
    for index, (bits, start, stop) in enumerate(zip(widths, starts, [*starts[1:], word_rows], strict=True)):
        here = f"{where}: q_groups entry {index}"
        if bits not in WIDTHS:
            raise FormatError(f"{here} has {bits} bits, wanted one of {sorted(WIDTHS)}", hint=DAMAGED)
        if groups and bits > groups[-1].bits:
            raise FormatError(f"{here} has {bits} bits after {groups[-1].bits}, wanted non-increasing", hint=DAMAGED)
        if stop <= start:
            raise FormatError(f"{here} covers rows {start} to {stop} of q_weight, wanted at least one", hint=DAMAGED)
        if (stop - start) % bits:
            raise FormatError(
                f"{here} has {stop - start} word rows of {bits}-bit codes, wanted whole blocks of {ROW_MULTIPLE} rows",
                hint=DAMAGED,
            )
        rows = (stop - start) // bits * ROW_MULTIPLE
        groups.append(Group(bits, start, stop - start, first_row, rows))
        first_row += rows
    return tuple(groups)


def require_permutation(q_invperm: Tensor, where: str) -> None:
    """FormatError unless q_invperm holds every number 0 .. K-1 exactly once."""
    size = q_invperm.numel()
    if int(q_invperm.min()) < 0 or int(q_invperm.max()) >= size:
        outside = int(q_invperm[(q_invperm < 0) | (q_invperm >= size)][0])
        raise FormatError(f"{where}: q_invperm holds {outside}, wanted numbers from 0 to {size - 1}", hint=DAMAGED)
    counts = torch.bincount(q_invperm, minlength=size)
    if int(counts.max()) > 1:
        raise FormatError(f"{where}: q_invperm holds {int(counts.argmax())} more than once", hint=DAMAGED)
