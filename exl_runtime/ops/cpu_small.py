"""The small operations on the native CPU kernels: what `ops.table` hands out as backend "cpu".

The contracts stand at the reference implementations (`ops.norm`, `ops.activation`, `ops.moe`, `ops.rope`,
`ops.kv_append`).
"""

from torch import Tensor

from ..errors import UnsupportedModel
from .activation import ACTIVATIONS
from .native import ops

_ops = ops()


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """See `ops.norm.rms_norm`. The mean square is summed in double."""
    return _ops.rms_norm(x if x.is_contiguous() else x.contiguous(), weight, eps, weight_offset)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `ops.activation.gated`. Takes the two halves of one fused projection as they lie."""
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return _ops.gated(gate, up, activation)


def route(logits: Tensor, experts_per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """See `ops.moe.route`. Shares are computed in double."""
    weights, experts = _ops.route(logits.float().contiguous(), experts_per_token, normalize)
    return weights, experts.long()


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.rope.rope`. Writes into q and k, which may be slices of one fused projection, and returns them."""
    _ops.rope_(q, k, cos, sin)
    return q, k


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `ops.kv_append.append_kv`. A slot outside the pages is a RuntimeError, before anything is written."""
    _ops.append_kv(k, v, k_pages, v_pages, slots)
