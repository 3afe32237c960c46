"""What of an encoded model learns in tuning: stored tensors as functions of float32 parameters, rounded as stored.

Values pass through the exact arithmetic of the format; gradients pass straight through every rounding (Bengio et al.,
2013). Knows no model.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .encoded import Encoded

# Latent codes start this part of the way from the code to the source's weight. Further out, many lie at a boundary and
# flip together in the first steps, which undoes the encoder's error feedback.
START = 0.5


class TunableTensor:
    """A tensor stored in half precision. move, in its shape: how far it went, in units of its median size."""

    def __init__(self, value: Tensor, offset: float) -> None:
        """value: float32, exact halves. offset: what the model adds to it, which counts as part of its size."""
        self._first = value
        self._unit = float((value + offset).abs().median())
        self.move = torch.zeros_like(value, requires_grad=True)

    def weight(self) -> Tensor:
        """float32, exact halves."""
        exact = self._first + self._unit * self.move
        return exact + (exact.half().float() - exact).detach()


class TunableMatrix:
    """An encoded matrix. Scale codes and the order of rows stay: tuning the former made models worse (encoder.md 5).

    latent  float32 (K, N), stored order: codes before they are rounded
    growth  float32 (G,): log of the factor that the groups' maxima have grown by
    """

    def __init__(self, encoded: Encoded, target: Tensor) -> None:
        """target: the source's matrix, float32 (K, N)."""
        self._encoded = encoded
        device = encoded.codes.device
        self._counts = [rows for _, rows in encoded.layout]
        widths = torch.tensor([bits for bits, _ in encoded.layout], device=device)
        self._groups = torch.arange(len(encoded.layout), device=device).repeat_interleave(
            torch.tensor(self._counts, device=device)
        )
        self._high = torch.pow(2.0, widths - 1).sub_(1)[self._groups][:, None]
        self._low = -1 - self._high
        self.perm, self.inverse = encoded.perm, torch.argsort(encoded.perm)
        scales, codes = encoded.scales()[self._groups], encoded.codes.float()
        ideal = torch.where(scales > 0, target[encoded.perm] / scales, codes)
        self.latent = codes.add_((ideal - codes).clamp_(-0.5, 0.5), alpha=START).requires_grad_(True)
        self.growth = torch.zeros(len(encoded.layout), device=device, requires_grad=True)

    def weight(self) -> Tensor:
        """float32 (K, N), rows in the model's order: bit for bit what `export().weight()` is."""
        return _Decode.apply(self.latent, self.growth, self)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep latents where the next steps can still bring them back from."""
        torch.minimum(self.latent, self._high + 0.49, out=self.latent.data)
        torch.maximum(self.latent, self._low - 0.49, out=self.latent.data)

    @torch.no_grad()
    def export(self) -> Encoded:
        """As it would be stored now."""
        return replace(self._encoded, codes=self._codes().to(torch.int8), scale_max=self._maxima())

    def _codes(self) -> Tensor:
        codes = torch.round(self.latent).add_(0.0)  # turns -0 into 0, as integer codes know no other
        return torch.maximum(torch.minimum(codes, self._high, out=codes), self._low, out=codes)

    def _maxima(self) -> Tensor:
        return (self._encoded.scale_max.float() * self.growth.exp()).half()

    def per_group(self, rows: Tensor) -> Tensor:
        """Sums over the rows of every group: (K,) -> (G,)."""
        return torch.stack([part.sum() for part in rows.split(self._counts)])

    def decode(self) -> tuple[Tensor, Tensor]:
        """Weights and the scale of every row, float32 (K, N), stored order; without gradients."""
        scales = replace(self._encoded, scale_max=self._maxima()).scales()[self._groups]
        return self._codes().mul_(scales).half().float(), scales


class _Decode(torch.autograd.Function):
    """Latents and growth to weights W = code * S: dW/dlatent is S, dW/dgrowth is W, as S grows with the maximum."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, growth: Tensor, matrix: TunableMatrix) -> Tensor:
        stored, scales = matrix.decode()
        ctx.save_for_backward(stored, scales)
        ctx.matrix = matrix
        return stored[matrix.inverse]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        stored, scales = ctx.saved_tensors
        gradient = gradients[0][ctx.matrix.perm]
        return gradient * scales, ctx.matrix.per_group((gradient * stored).sum(dim=1)), None
