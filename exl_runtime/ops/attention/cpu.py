"""Paged attention by the native CPU kernel (ext/cpu/attention.h). See `base.py` for the contract."""

import torch
from torch import Tensor

from .. import native


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_starts: Tensor,
    kv_lengths: Tensor,
    pages: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Arguments as in `base.PagedAttention`; computed in float32.

    A query's result is the same bits in one prefill, in pieces or token by token, in any batch, on any number of
    threads.
    """
    wide = q if q.dtype == torch.float32 else q.float()
    out = native.ops().paged_attention(
        wide.contiguous(), k_pages, v_pages, q_starts, kv_lengths, pages, scale, window, softcap
    )
    return out if q.dtype == torch.float32 else out.to(q.dtype)
