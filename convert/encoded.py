"""One EXL2 matrix as the encoder sees it, and as it lies on disk (formats/exl2.md 2-4). Knows no model, no files.

Notation: K = in_features, N = out_features, Np = N rounded up to 32, G = number of groups. Stored row order is the
encoder's: row k of `codes` belongs to row perm[k] of the model.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from exl_runtime.errors import ConvertError, NonFiniteError
from exl_runtime.formats import Exl2, LinearShape
from exl_runtime.formats.bits import pack_columns, pack_rows, unpack_rows
from exl_runtime.formats.exl2 import COLUMN_MULTIPLE, PIECE, ROW_MULTIPLE, WIDTHS

Layout = tuple[tuple[int, int], ...]  # (bits, rows) of every group, in stored order

# Readers hold permutations in 16 bits. Word rows of groups (15 bits there) then fit too: at 8 bits there are 16384.
MAX_INPUTS = 65536
HALF_MAX = 65504.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """One encoded matrix; all tensors on one device. Raises ValueError for dtypes, shapes and layouts out of line."""

    layout: Layout  # widths never rise, rows are multiples of 32
    codes: Tensor  # int8 (K, N): -2^(b-1) .. 2^(b-1) - 1
    scale_codes: Tensor  # uint8 (G, N): 1 .. 16
    scale_max: Tensor  # float16 (G,)
    perm: Tensor  # int64 (K,): the model row that stored row k holds

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or not self.codes.shape[1]:
            raise ValueError(f"codes have the shape {tuple(self.codes.shape)}, wanted (inputs, outputs)")
        inputs, outputs = self.codes.shape
        check_layout(self.layout, inputs)
        groups = len(self.layout)
        for name, dtype, shape in (
            ("codes", torch.int8, (inputs, outputs)),
            ("scale_codes", torch.uint8, (groups, outputs)),
            ("scale_max", torch.float16, (groups,)),
            ("perm", torch.int64, (inputs,)),
        ):
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, wanted {dtype} {shape}")

    @property
    def inputs(self) -> int:
        """K."""
        return self.codes.shape[0]

    @property
    def outputs(self) -> int:
        """N."""
        return self.codes.shape[1]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], outputs: int, *, where: str = "matrix") -> Self:
        """The inverse of `tensors`; padding columns are dropped. Raises FormatError, NonFiniteError naming `where`."""
        inputs = Exl2.infer_shape(tensors, where=where).in_features
        stored = Exl2.load(tensors, LinearShape(inputs, outputs), where=where)
        layout = tuple((group.bits, group.rows) for group in stored.groups)
        codes = torch.empty(inputs, outputs, dtype=torch.int8, device=stored.q_weight.device)
        word = 0
        for bits, start, stop in _pieces(layout, outputs):
            words = (stop - start) * bits // 32
            piece = unpack_rows(stored.q_weight[word : word + words, :outputs], bits, torch.int16)
            codes[start:stop] = piece.sub_(1 << (bits - 1))
            word += words
        perm = torch.arange(inputs, device=codes.device) if stored.perm is None else stored.perm
        return cls(
            layout=layout,
            codes=codes,
            scale_codes=stored.scale_codes()[:, :outputs].contiguous(),
            scale_max=stored.q_scale_max,
            perm=perm,
        )

    def scales(self) -> Tensor:
        """float32 (G, N), every value a half: S = round(s * s * M), M = round(scale_max / 256)."""
        unit = (self.scale_max.float() * (1.0 / 256.0)).half().float()
        codes = self.scale_codes.float()
        return (codes * codes * unit[:, None]).half().float()

    def weight(self) -> Tensor:
        """float32 (K, N), rows in the model's order, every value a half: what readers of the tensors compute."""
        scales = self.scales()
        weight = torch.empty(self.inputs, self.outputs, device=self.codes.device)
        first = 0
        for index, (_, rows) in enumerate(self.layout):
            for start, stop in _steps(first, first + rows, self.outputs):
                # Both factors are halves, so their float32 product is exact and .half() rounds once.
                piece = self.codes[start:stop].float().mul_(scales[index]).half()
                weight[self.perm[start:stop]] = piece.float()
            first += rows
        return weight

    def tensors(self, bias: Tensor | None = None, *, where: str = "matrix") -> dict[str, Tensor]:
        """Suffix -> tensor as on disk; shapes and dtypes are those of `stored_shapes`.

        bias   (N,), any float dtype: rounded to half. Padding columns get the code of zero and scale code 1.
        Raises ConvertError when K does not fit the format, NonFiniteError when a weight or the bias is not a finite
        half, ValueError for codes out of range or a `perm` that is none: those are the encoder's mistakes.
        """
        require_inputs(self.inputs, where)
        self._require_consistent(where)
        pad = -self.outputs % COLUMN_MULTIPLE
        words = [
            pack_rows(_wider(self.codes[start:stop].to(torch.int16) + (1 << (bits - 1)), pad, 1 << (bits - 1)), bits)
            for bits, start, stop in _pieces(self.layout, self.outputs)
        ]
        table, first = [], 0
        for bits, rows in self.layout:
            table += [bits, first]
            first += rows * bits // 32
        device = self.codes.device
        invperm = torch.empty(self.inputs, dtype=torch.int32, device=device)
        invperm[self.perm] = torch.arange(self.inputs, dtype=torch.int32, device=device)
        tensors = {
            "q_weight": torch.cat(words),
            "q_scale": pack_columns(_wider(self.scale_codes - 1, pad, 0), 4),
            "q_scale_max": self.scale_max,
            "q_groups": torch.tensor(table, dtype=torch.int16, device=device),
            "q_invperm": invperm,
        }
        if bias is not None:
            tensors["bias"] = self._stored_bias(bias, pad, where)
        return tensors

    def _stored_bias(self, bias: Tensor, pad: int, where: str) -> Tensor:
        if tuple(bias.shape) != (self.outputs,):
            raise ValueError(f"{where}: bias has the shape {tuple(bias.shape)}, wanted ({self.outputs},)")
        half = bias.detach().half()
        if not half.isfinite().all():
            raise NonFiniteError(
                f"{where}: the bias has values beyond half precision, which is all EXL2 can store (largest 65504)"
            )
        return torch.nn.functional.pad(half, (0, pad))

    def _require_consistent(self, where: str) -> None:
        low, high = (int(bound) for bound in torch.aminmax(self.scale_codes))
        if low < 1 or high > 16:
            raise ValueError(f"{where}: scale codes {low} to {high}, wanted 1 to 16")
        seen = torch.zeros(self.inputs, dtype=torch.bool, device=self.perm.device)
        if int(self.perm.min()) < 0 or int(self.perm.max()) >= self.inputs:
            raise ValueError(f"{where}: perm points outside the {self.inputs} rows")
        seen[self.perm] = True
        if not seen.all():
            raise ValueError(f"{where}: perm holds a row twice")
        # Finite maxima can still overflow a weight; look at the weights only where that is possible.
        largest = float(self.scale_max.float().abs().max()) * (1 << (self.layout[0][0] - 1))
        if not math.isfinite(largest) or (largest > HALF_MAX / 2 and not self.weight().isfinite().all()):
            raise NonFiniteError(f"{where}: weights or their scales are NaN or beyond half precision")


def check_layout(layout: Layout, inputs: int) -> None:
    """ValueError unless `layout` is groups of legal widths that never rise, of 32 n rows each, `inputs` rows in sum."""
    previous = WIDTHS[0]
    for index, (bits, rows) in enumerate(layout):
        if bits not in WIDTHS or bits > previous:
            raise ValueError(f"group {index} of the layout has {bits} bits after {previous}, wanted one of {WIDTHS}")
        if rows < 1 or rows % ROW_MULTIPLE:
            raise ValueError(f"group {index} of the layout has {rows} rows, wanted a multiple of {ROW_MULTIPLE}")
        previous = bits
    if (total := sum(rows for _, rows in layout)) != inputs or not layout:
        raise ValueError(f"the layout covers {total} rows, the matrix has {inputs}")


def require_inputs(inputs: int, where: str) -> None:
    """ConvertError unless a matrix of `inputs` rows can be EXL2 at all."""
    if inputs < ROW_MULTIPLE or inputs % ROW_MULTIPLE:
        raise ConvertError(
            f"{where}: {inputs} input features, EXL2 needs a multiple of {ROW_MULTIPLE}",
            hint="this model cannot be stored as EXL2",
        )
    if inputs > MAX_INPUTS:
        raise ConvertError(
            f"{where}: {inputs} input features, EXL2 holds at most {MAX_INPUTS}",
            hint="this model cannot be stored as EXL2",
        )


def stored_shapes(
    layout: Layout, outputs: int, *, biased: bool = False
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of what `Encoded.tensors` returns, without encoding anything."""
    padded = -(-outputs // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    groups = len(layout)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "q_weight": (torch.int32, (sum(bits * rows for bits, rows in layout) // 32, padded)),
        "q_scale": (torch.int32, (groups, padded // 8)),
        "q_scale_max": (torch.float16, (groups,)),
        "q_groups": (torch.int16, (2 * groups,)),
        "q_invperm": (torch.int32, (sum(rows for _, rows in layout),)),
    }
    return {**shapes, "bias": (torch.float16, (padded,))} if biased else shapes


def stored_bits(layout: Layout, inputs: int, outputs: int, *, biased: bool = False) -> int:
    """Bits of one matrix on disk (formats/exl2.md 4.3, N padded to 32): 8 times the bytes of its tensors."""
    check_layout(layout, inputs)
    padded = -(-outputs // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    codes = sum(bits * rows for bits, rows in layout) * padded
    per_group = 16 + 32 + 4 * padded  # scale maximum, table entry, scale codes
    return codes + per_group * len(layout) + 32 * inputs + (16 * padded if biased else 0)


def _pieces(layout: Layout, outputs: int) -> Iterator[tuple[int, int, int]]:
    """(bits, first row, end row) of pieces that bound temporaries; groups of one width form one stream."""
    start = 0
    for width in WIDTHS:
        stop = start + sum(rows for bits, rows in layout if bits == width)
        for first, end in _steps(start, stop, outputs):
            yield width, first, end
        start = stop


def _steps(start: int, stop: int, outputs: int) -> Iterator[tuple[int, int]]:
    step = max(ROW_MULTIPLE, PIECE // max(outputs, 1) // ROW_MULTIPLE * ROW_MULTIPLE)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _wider(values: Tensor, pad: int, filler: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, pad), value=filler) if pad else values
