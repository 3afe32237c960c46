"""EXL2 matrices on a CUDA card: codes and 4-bit scales stay packed, about the size on disk."""

import torch

from ...formats.base import QuantFormat
from ...formats.exl2 import Exl2
from .packed_cuda import PackedCuda, packed_refusal
from .tiles import Run
from .tiles_cuda import build


class Exl2Cuda(PackedCuda):
    """See the base class."""

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """See the base class."""
        if not isinstance(w, Exl2):
            return f"takes exl2 weights, not {w.name}"
        return packed_refusal(w.shape.out_features, device)

    def __init__(self, w: QuantFormat, device: torch.device) -> None:
        assert isinstance(w, Exl2)
        self.shape = w.shape
        matrix = build(
            inputs=w.shape.in_features,
            outputs=w.shape.out_features,
            runs=[Run(group.bits, group.rows) for group in w.groups],
            words=w.q_weight.to(device),
            order=None,
            rows=None if w.perm is None else w.perm.to(device=device, dtype=torch.int32),
            scales=(w.scale_codes() - 1).to(device),
            maxima=w.group_scales().to(device),
        )
        super().__init__(matrix, device)
