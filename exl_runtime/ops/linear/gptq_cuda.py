"""GPTQ matrices on a CUDA card: 2, 3, 4 and 8 bits, any group size, activation order by sorting rows once at load."""

import torch

from ...formats.base import QuantFormat
from ...formats.gptq import Gptq
from .gptq_cpu import sort_rows
from .packed_cuda import PackedCuda, packed_refusal
from .tiles import Run
from .tiles_cuda import build


class GptqCuda(PackedCuda):
    """See the base class. Groups that are no multiple of 32 rows are padded: right, but larger than on disk."""

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """See the base class."""
        if not isinstance(w, Gptq):
            return f"takes gptq weights, not {w.name}"
        return packed_refusal(w.shape.out_features, device)

    def __init__(self, w: QuantFormat, device: torch.device) -> None:
        assert isinstance(w, Gptq)
        self.shape = w.shape
        order, sizes, groups = sort_rows(w.row_group.cpu())
        in_order = torch.equal(order, torch.arange(w.shape.in_features, dtype=torch.int32))
        zeros = w.zeros.cpu()[groups]
        low, high = (int(bound) for bound in torch.aminmax(zeros))
        symmetric = low == high == 1 << (w.bits - 1)
        assert high - low < 256  # a byte, from the lowest on; see GptqCpu
        rows = None if in_order else order.to(device)
        matrix = build(
            inputs=w.shape.in_features,
            outputs=w.shape.out_features,
            runs=[Run(w.bits, size) for size in sizes],
            words=w.qweight.to(device),
            order=rows,
            rows=rows,
            scales=w.scales.cpu()[groups].to(device),
            zeros=None if symmetric else (zeros - low).to(torch.uint8).to(device),
            zero_base=low,
        )
        super().__init__(matrix, device)
