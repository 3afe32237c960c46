"""Unquantized matrices on the CPU: the checkpoint's own tensor, widened to float32 in registers."""

from typing import ClassVar

import torch
from torch import Tensor

from ...formats.base import QuantFormat
from ...formats.dense import Dense
from .. import native
from .base import LinearKernel
from .tiles import flat_float, like_input, native_refusal


class DenseCpu(LinearKernel):
    """See the base class and ext/cpu/linear_dense.h. The stored (out, in) layout suits the kernel as it is."""

    backend: ClassVar[str] = "cpu"

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """See the base class."""
        if not isinstance(w, Dense):
            return f"takes dense weights, not {w.name}"
        return native_refusal(device)

    def __init__(self, w: QuantFormat, device: torch.device) -> None:
        assert isinstance(w, Dense)
        self.shape = w.shape
        self.weight = w.weight.cpu().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """See the base class."""
        y = native.ops().linear_dense(flat_float(x), self.weight)
        return like_input(y, x)

    @property
    def storage_bytes(self) -> int:
        """See the base class."""
        return self.weight.nbytes
