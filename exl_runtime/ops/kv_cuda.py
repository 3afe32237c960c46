"""Rotating and storing new keys and values on CUDA (ext/cuda/kv_append.h). Contracts: `ops.rope`, `ops.kv_append`."""

from torch import Tensor

from .native import cuda_ops


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.rope.rope`. Writes into q and k, which may be slices of one fused projection, and returns them."""
    cuda_ops(q.device).rope_(q, k, cos, sin)
    return q, k


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `ops.kv_append.append_kv`; the same bits. A slot outside the pages is not written."""
    cuda_ops(k.device).append_kv(k, v, k_pages, v_pages, slots)


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> Tensor:
    """`rope` and `append_kv` in one launch, with the same bits. Returns q, rotated in place; k stays as it was.

    Shapes as in `ops.rope.rope` and `ops.kv_append.append_kv`.
    """
    cuda_ops(q.device).rope_append_(q, k, v, cos, sin, k_pages, v_pages, slots)
    return q
