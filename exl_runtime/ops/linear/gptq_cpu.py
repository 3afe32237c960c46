"""GPTQ matrices on the CPU: 2, 3, 4 and 8 bits, any group size, activation order by sorting rows once at load."""

from typing import ClassVar

import torch
from torch import Tensor

from ...formats.base import QuantFormat
from ...formats.gptq import Gptq
from .. import native
from .base import LinearKernel
from .tiles import (
    STEP,
    TILE,
    CodeTiles,
    Run,
    flat_float,
    like_input,
    native_refusal,
    row_table,
    span_table,
    tile_by_group,
)


class GptqCpu(LinearKernel):
    """See the base class and ext/cpu/linear.h."""

    backend: ClassVar[str] = "cpu"

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """See the base class."""
        if not isinstance(w, Gptq):
            return f"takes gptq weights, not {w.name}"
        return native_refusal(device)

    def __init__(self, w: QuantFormat, device: torch.device) -> None:
        assert isinstance(w, Gptq)
        self.shape = w.shape
        outputs = w.shape.out_features
        order, runs = sort_rows(w.row_group.cpu(), w.bits)
        self._spans, self._rows = span_table(runs), row_table(order, runs)

        tiles = CodeTiles(outputs, TILE * order.numel() * w.bits // 8)
        in_order = torch.equal(order, torch.arange(w.shape.in_features))
        tiles.append(w.qweight.cpu(), w.bits, None if in_order else order.to(torch.int32))
        self._codes = tiles.buffer

        self._scales = tile_by_group(w.scales.cpu())
        zeros = w.zeros.cpu()
        low, high = torch.aminmax(zeros)
        # Zero-points of at most 2^8 are exact halves; symmetric matrices need none.
        self._zeros = None if int(low) == int(high) == 1 << (w.bits - 1) else tile_by_group(zeros.half())

    def __call__(self, x: Tensor) -> Tensor:
        """See the base class."""
        y = native.ops().linear_gptq(
            flat_float(x), self._codes, self._scales, self._zeros, self._spans, self._rows, self.shape.out_features
        )
        return like_input(y, x)

    @property
    def storage_bytes(self) -> int:
        """See the base class."""
        held = (self._codes, self._scales, self._zeros, self._spans, self._rows)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def sort_rows(row_group: Tensor, bits: int) -> tuple[Tensor, list[Run]]:
    """(row at every position int64, the runs): rows sorted by group, order kept inside a group, -1 filling up steps.

    row_group: int32 (K,).
    """
    by_group = torch.argsort(row_group, stable=True)
    counts = torch.bincount(row_group)
    pieces, runs = [], []
    for group, rows in enumerate(by_group.split(counts.tolist())):
        if not rows.numel():
            continue
        padding = -rows.numel() % STEP
        pieces.append(torch.cat([rows, rows.new_full((padding,), -1)]) if padding else rows)
        runs.append(Run(bits, group, rows.numel() + padding))
    return torch.cat(pieces), runs
