"""EXL2 matrices on the CPU: codes and 4-bit scales stay packed, the native kernel decodes them in registers."""

import torch
from torch import Tensor

from ...formats.base import QuantFormat
from ...formats.exl2 import Exl2
from .packed_cpu import PackedCpu
from .packing import Packing
from .tiles import Residual, Run, Source, native_refusal


class Exl2Cpu(PackedCpu):
    """See the base class. Holds 4-bit codes in 4 bits: about the size on disk."""

    repacks = True

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """See the base class."""
        if not isinstance(w, Exl2):
            return f"takes exl2 weights, not {w.name}"
        return native_refusal(device)

    def __init__(
        self, w: QuantFormat, device: torch.device, residual: int = Residual.ALWAYS, packing: Packing | None = None
    ) -> None:
        assert isinstance(w, Exl2)
        packing = packing or Packing()
        self.shape = w.shape
        self.output_order = packing.outputs
        rows = None if w.perm is None else w.perm.cpu().to(torch.int32)
        if packing.sort_inputs:
            self.input_order, rows = rows, None
        source = Source(
            inputs=w.shape.in_features,
            outputs=w.shape.out_features,
            runs=[Run(group.bits, group.rows) for group in w.groups],
            words=w.q_weight.cpu(),
            order=None,
            rows=rows,
            scales=w.q_scale.cpu(),
            tables=scale_tables(w.group_scales().cpu()),
            columns=packing.outputs,
            take=packing.take,
        )
        super().__init__(source, residual)


def scale_tables(maxima: Tensor) -> Tensor:
    """float32 (G, 16): the scale of every nibble, (nibble + 1)^2 * maxima rounded to half. maxima (G,)."""
    squares = torch.arange(1, 17, dtype=torch.float32).square()
    return (squares * maxima.float()[:, None]).half().float()
