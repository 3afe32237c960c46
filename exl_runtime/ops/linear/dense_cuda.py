"""Unquantized matrices on a CUDA card: torch's own multiplication, which is hard to beat there."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats.base import QuantFormat
from ...formats.dense import Dense
from .. import native
from .base import LinearKernel
from .packed_cuda import into_half, multiply_half

HALF_LIMIT = 65504.0


class DenseCuda(LinearKernel):
    """See the base class. Sums in float32.

    bfloat16 weights are held as float16 where all fit: x is float16 here, and has three bits more than bfloat16.
    Weights below 2^-14 lose precision then, by at most 2^-25. float32 weights, and bfloat16 ones out of range, stay.
    """

    backend: ClassVar[str] = "cuda"

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """See the base class."""
        if not isinstance(w, Dense):
            return f"takes dense weights, not {w.name}"
        return native.cuda_refusal(device)

    def __init__(self, w: QuantFormat, device: torch.device) -> None:
        assert isinstance(w, Dense)
        self.shape = w.shape
        weight = w.weight.to(device)
        if weight.dtype == torch.bfloat16 and (not weight.numel() or float(weight.abs().max()) < HALF_LIMIT):
            weight = weight.half()
        self._weight = weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """See the base class."""
        if x.dtype == torch.float16 and self._weight.dtype == torch.float16 and x.is_cuda:
            return F.linear(x, self._weight)
        return self.float32(x).to(x.dtype)

    def float32(self, x: Tensor) -> Tensor:
        """The product in float32, whatever the dtype of x: for logits."""
        if self._weight.dtype != torch.float16:
            return F.linear(x.float(), self._weight.float())
        half, factor = into_half(x.reshape(-1, x.shape[-1]))
        y = multiply_half(half, self._weight.t())
        y = y if factor is None else y.mul_(factor)
        return y.view(*x.shape[:-1], self.shape.out_features)

    def add_to(self, stream: Tensor, x: Tensor) -> Tensor:
        """stream += x @ W. stream float32 (m, out_features)."""
        return stream.add_(self.float32(x).view(stream.shape))

    @property
    def storage_bytes(self) -> int:
        """See the base class."""
        return self._weight.nbytes
