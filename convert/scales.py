"""Scales of one group of rows: the maximum that the group shares and the 4-bit code of every column.

Two rules: exllamav2's (formats/exl2.md 6.3), and a search that tries what the stored, rounded scales really do.
Notation: w float32 (R, N) the group's current weights; M = half(scale_max / 256), S = half(s * s * M).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from exl_runtime.ops import encode as ops

CLASSIC_STEPS = 97
CANDIDATES = 16  # maxima tried by the search, between these parts of the classic maximum
LOWEST, HIGHEST = 0.5, 1.25
FINALISTS = 3  # maxima whose columns are judged by running the error feedback
SPREAD = 2  # neighbouring scale codes tried with each
LEAST_UNIT = 2.0**-24  # the least half above zero: below it a whole group would vanish


@dataclass(frozen=True, slots=True)
class Scales:
    """codes uint8 (N,): 1 .. 16;  maximum float16 scalar tensor: what q_scale_max holds."""

    codes: Tensor
    maximum: Tensor

    def values(self) -> Tensor:
        """S float32 (N,), every value a half."""
        return scale_values(self.codes, unit(self.maximum))


def unit(maximum: Tensor) -> Tensor:
    """M = half(maximum / 256) as float32, any shape."""
    return (maximum.float() * (1.0 / 256.0)).half().float()


def scale_values(codes: Tensor, units: Tensor) -> Tensor:
    """S = half(codes^2 * units), float32."""
    wide = codes.float()
    return (wide * wide * units).half().float()


def classic(w: Tensor, bits: int) -> Scales:
    """exllamav2's rule: codes from the columns' largest weights, one factor p for the group by an L3.5 norm."""
    base, top = _base(w, bits)
    codes = torch.round(16 * torch.sqrt(base / top)).clamp(1, 16)
    fine = (codes / 16) ** 2 * top
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    best, factor = math.inf, 1.0
    for step in range(CLASSIC_STEPS):
        at = step / (CLASSIC_STEPS - 1)
        p = 0.70 * (1 - at) + 1.2 * at
        scale = fine * p
        off = torch.round(w / scale).clamp_(low, high).mul_(scale).sub_(w).abs_()
        error = float((off * off * off * off.sqrt()).sum())
        if error < best:
            best, factor = error, p
    return Scales(codes.to(torch.uint8), (top * factor).half())


def search(w: Tensor, bits: int, row_weights: Tensor, u: Tensor | None) -> Scales:
    """The scales with the least error after feedback inside the group (encoder.md 1, `gq`).

    row_weights  float32 (R,): what a squared error in each row costs
    u            float32 (R, R) upper factor of the group; None: judge without feedback
    """
    _, top = _base(w, bits)
    ratio = torch.linspace(math.log(LOWEST), math.log(HIGHEST), CANDIDATES, device=w.device).exp()
    maxima = (top * ratio).clamp_min(256 * LEAST_UNIT).half()
    codes, losses = ops.scale_search(w, row_weights, unit(maxima), bits)
    order = torch.argsort(losses.sum(dim=1, dtype=torch.float64), stable=True).tolist()
    if u is None:
        return Scales(codes[order[0]], maxima[order[0]])
    best: tuple[float, Scales] | None = None
    for index in order[:FINALISTS]:
        near = neighbours(codes[index], SPREAD)
        choice, loss = ops.feedback_best(w, u, scale_values(near, unit(maxima[index])), bits)
        total = float(loss.sum(dtype=torch.float64))
        if best is None or total < best[0]:
            picked = near.gather(0, choice[None].long())[0]
            best = (total, Scales(picked, maxima[index]))
    assert best is not None
    return best[1]


def neighbours(codes: Tensor, spread: int) -> Tensor:
    """uint8 (2 spread + 1, N): `codes` and those around it, within 1 .. 16."""
    steps = torch.arange(-spread, spread + 1, device=codes.device)[:, None]
    return (codes.to(torch.int64) + steps).clamp_(1, 16).to(torch.uint8)


def _base(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What a column's largest weight asks of its scale (N,), and the largest of these."""
    base = (w.abs().amax(dim=0) + 1e-12) / ((2**bits - 1) / 2)
    return base, base.max()
