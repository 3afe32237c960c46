"""The multiplication every kernel is measured against: any format, any device, plain torch."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats.base import QuantFormat
from ...formats.dense import Dense
from .base import LinearKernel

# Weights computed with at a time. A matrix of at most this many is held in float32 outright, as converting it anew
# for every token would cost more than the 16 MiB; a larger one is converted panel by panel.
PANEL = 1 << 22


class Reference(LinearKernel):
    """Dequantizes once, when built; multiplies in float32 on the CPU, in x's dtype on other devices.

    Quantized weights are held as float16, which is exact (their values are halves); dense ones as stored.
    """

    backend: ClassVar[str] = "reference"

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """Takes every format on every device."""
        return None

    def __init__(self, w: QuantFormat, device: torch.device) -> None:
        self.shape = w.shape
        inputs, outputs = w.shape.in_features, w.shape.out_features
        self._rows = max(1, PANEL // max(inputs, 1))  # output features of one panel
        small = inputs * outputs <= PANEL and device.type == "cpu"
        if isinstance(w, Dense):
            self._weight = w.weight.to(device=device, dtype=torch.float32 if small else w.weight.dtype)
            return
        # (out_features, in_features): a row is one output feature, a panel one contiguous piece.
        self._weight = torch.empty(outputs, inputs, dtype=torch.float32 if small else torch.float16, device=device)
        for start in range(0, outputs, self._rows):
            stop = min(start + self._rows, outputs)
            self._weight[start:stop] = w.columns(start, stop).dequantize().t()

    def __call__(self, x: Tensor) -> Tensor:
        """See the base class."""
        compute = torch.float32 if x.device.type == "cpu" else x.dtype
        flat = x.reshape(-1, self.shape.in_features).to(compute)
        if self._weight.dtype == compute:
            y = F.linear(flat, self._weight)
        else:
            y = flat.new_empty(flat.shape[0], self.shape.out_features)
            for start in range(0, self.shape.out_features, self._rows):
                panel = self._weight[start : start + self._rows]
                y[:, start : start + self._rows] = F.linear(flat, panel.to(compute))
        return y.to(x.dtype).view(*x.shape[:-1], self.shape.out_features)

    @property
    def storage_bytes(self) -> int:
        """See the base class."""
        return self._weight.numel() * self._weight.element_size()
