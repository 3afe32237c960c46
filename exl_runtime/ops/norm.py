"""RMSNorm in plain torch, any device: the definition that every kernel is measured against."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over the last dimension (Zhang and Sennrich, 2019).

    x              (..., C), any float dtype
    weight         float32 (C,)
    eps            added to the mean square, before the root
    weight_offset  0, or 1 for models that store norm weights around zero
    Returns x's shape and dtype. float32 inside, rounded once at the end.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (weight + weight_offset)).to(x.dtype)
