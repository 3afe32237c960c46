"""`OpSet`: the small operations of a model on one backend, as plain functions. Knows no matrices and no models."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from ..errors import BackendUnavailable
from .attention.base import PagedAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSet:
    """One backend's functions; their contracts stand at the reference implementation of each.

    rms_norm(x, weight, eps, weight_offset)             `ops.norm`
    gated(gate, up, activation)                         `ops.activation`
    route(logits, experts_per_token, normalize)         `ops.moe`
    rope(q, k, cos, sin)                                `ops.rope`; may write in place, use what it returns
    append_kv(k, v, k_pages, v_pages, slots)            `ops.kv_append`
    paged_attention(q, k_pages, v_pages, q_starts, kv_lengths, pages, scale, window, softcap)   `ops.attention.base`
    """

    backend: str
    rms_norm: Callable[[Tensor, Tensor, float, float], Tensor]
    gated: Callable[[Tensor, Tensor, str], Tensor]
    route: Callable[[Tensor, int, bool], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    append_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_attention: PagedAttention


def _reference() -> OpSet:
    from .activation import gated
    from .attention.reference import paged_attention
    from .kv_append import append_kv
    from .moe import route
    from .norm import rms_norm
    from .rope import rope

    return OpSet(
        backend="reference",
        rms_norm=rms_norm,
        gated=gated,
        route=route,
        rope=rope,
        append_kv=append_kv,
        paged_attention=paged_attention,
    )


def _cpu() -> OpSet:
    from . import cpu_small, native
    from .attention.cpu import paged_attention

    native.ensure_loaded()
    return OpSet(
        backend="cpu",
        rms_norm=cpu_small.rms_norm,
        gated=cpu_small.gated,
        route=cpu_small.route,
        rope=cpu_small.rope,
        append_kv=cpu_small.append_kv,
        paged_attention=paged_attention,
    )


def _cuda() -> OpSet:
    from . import cuda_small
    from .attention.cuda import paged_attention
    from .kv_cuda import append_kv, rope
    from .moe import route

    return OpSet(
        backend="cuda",
        rms_norm=cuda_small.rms_norm,
        gated=cuda_small.gated,
        route=route,
        rope=rope,
        append_kv=append_kv,
        paged_attention=paged_attention,
    )


# One line per backend. A builder imports late, so that asking for one backend never loads another.
BUILDERS: dict[str, Callable[[], OpSet]] = {
    "reference": _reference,
    "cpu": _cpu,
    "cuda": _cuda,
}


@cache
def opset(backend: str) -> OpSet:
    """The functions of `backend`; BackendUnavailable for an unknown one, or when it cannot run here."""
    if backend not in BUILDERS:
        raise BackendUnavailable(f"backend {backend!r} is not one of {', '.join(BUILDERS)}")
    return BUILDERS[backend]()
