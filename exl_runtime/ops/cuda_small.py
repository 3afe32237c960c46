"""The small operations on the native CUDA kernels: what `ops.table` hands out as backend "cuda".

The contracts stand at the reference implementations (`ops.norm`, `ops.activation`); ext/cuda/norm.h, gated.h and
embed.h say what the fused forms compute. Tensors are on one CUDA device, or on the CPU where tests emulate one.
"""

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from .activation import ACTIVATIONS
from .native import cuda_ops


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    *,
    order: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `ops.norm.rms_norm`. `order`, int32 (C,), permutes what is normalized; `dtype` is that of the result."""
    x = x if x.is_contiguous() else x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    cuda_ops(x.device).rms_norm(x, weight, order, y, eps, weight_offset)
    return y


def add_rms_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    *,
    order: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """x += delta in place, then the RMSNorm of x in `dtype`: the end of one half-layer, the start of the next.

    x  float32 (T, C)          delta  (T, C), any float dtype
    """
    y = torch.empty_like(x, dtype=dtype)
    delta = delta if delta.is_contiguous() else delta.contiguous()
    cuda_ops(x.device).add_rms_norm(x, delta, weight, order, y, eps, weight_offset)
    return y


def gated(gate: Tensor, up: Tensor, activation: str, *, dtype: torch.dtype | None = None) -> Tensor:
    """See `ops.activation.gated`. Takes the two halves of one fused projection as they lie.

    dtype  of the result: that of gate, or float32, in which nothing overflows
    """
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    shape = gate.shape
    gate, up = (t if t.dim() == 2 else t.reshape(-1, shape[-1]) for t in (gate, up))
    gate, up = (t if t.stride(-1) == 1 else t.contiguous() for t in (gate, up))
    out = torch.empty(gate.shape, dtype=dtype or gate.dtype, device=gate.device)
    cuda_ops(gate.device).gated(gate, up, out, activation)
    return out.view(shape)


def embed(tokens: Tensor, table: Tensor, scale: float) -> Tensor:
    """Rows of `table` (vocab, C), any float dtype, as float32 (T, C) times `scale`; an unknown token gives NaN."""
    out = torch.empty(tokens.shape[0], table.shape[1], dtype=torch.float32, device=table.device)
    cuda_ops(table.device).embed(tokens, table, out, scale)
    return out
