"""GPTQ matrices on the CPU: 2, 3, 4 and 8 bits, any group size, activation order by sorting rows once at load."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats.base import QuantFormat
from ...formats.gptq import Gptq
from .packed_cpu import PackedCpu
from .packing import Packing
from .tiles import UNIT, Residual, Run, Source, native_refusal


class GptqCpu(PackedCpu):
    """See the base class."""

    repacks = True

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """See the base class."""
        if not isinstance(w, Gptq):
            return f"takes gptq weights, not {w.name}"
        return native_refusal(device)

    def __init__(
        self, w: QuantFormat, device: torch.device, residual: int = Residual.ALWAYS, packing: Packing | None = None
    ) -> None:
        assert isinstance(w, Gptq)
        packing = packing or Packing()
        self.shape = w.shape
        self.output_order = packing.outputs
        order, sizes, groups = sort_rows(w.row_group.cpu())
        in_order = torch.equal(order, torch.arange(w.shape.in_features, dtype=torch.int32))
        rows = None if in_order else order
        if packing.sort_inputs and order.numel() == w.shape.in_features:  # or some positions hold no input
            self.input_order, rows = rows, None
        zeros = w.zeros.cpu()[groups]
        low, high = (int(bound) for bound in torch.aminmax(zeros))
        symmetric = low == high == 1 << (w.bits - 1)
        # Zero-points span 0 .. 2^bits - 1, or 1 .. 2^bits where the file holds them less 1: a byte, from the lowest on.
        assert high - low < 256
        source = Source(
            inputs=w.shape.in_features,
            outputs=w.shape.out_features,
            runs=[Run(w.bits, size) for size in sizes],
            words=w.qweight.cpu(),
            order=None if in_order else order,
            rows=rows,
            scales=w.scales.cpu()[groups],
            zeros=None if symmetric else (zeros - low).to(torch.uint8),
            zero_base=low,
            columns=packing.outputs,
            take=packing.take,
        )
        super().__init__(source, residual)


def sort_rows(row_group: Tensor) -> tuple[Tensor, list[int], Tensor]:
    """(row at every position int32, positions of every group, the groups that have rows int64).

    Rows are sorted by group, their order kept inside a group, -1 filling up units. row_group: int32 (K,).
    """
    by_group = torch.argsort(row_group, stable=True)
    counts = torch.bincount(row_group)
    groups = counts.nonzero().flatten()
    pieces = [F.pad(rows, (0, -rows.numel() % UNIT), value=-1) for rows in by_group.split(counts[groups].tolist())]
    return torch.cat(pieces).to(torch.int32), [piece.numel() for piece in pieces], groups
