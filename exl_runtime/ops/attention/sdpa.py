"""Prefill by torch's scaled_dot_product_attention, over gathered keys, sequence by sequence. No softcap."""

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from .gather import gather, oldest_key


def prefill(
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
    """Arguments as in `base.PagedAttention`, of float pages and without a softcap; reads lengths from the device."""
    assert softcap is None and k_pages.is_floating_point()
    out = torch.empty_like(q)
    starts = q_starts.tolist()
    for s, length in enumerate(kv_lengths.tolist()):
        start, stop = starts[s], starts[s + 1]
        if start == stop:
            continue
        rows = stop - start
        oldest = oldest_key(length, rows, window)
        k, v = (gather(held, pages[s], oldest, length).to(q.dtype) for held in (k_pages, v_pages))
        if window is None:
            mask = causal_lower_right(rows, length)
        else:
            index = torch.arange(length - rows, length, device=q.device)[:, None]
            distance = index - torch.arange(oldest, length, device=q.device)
            mask = (distance >= 0) & (distance < window)
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q[start:stop], k, v))
        attended = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=queries.shape[1] != keys.shape[1]
        )
        out[start:stop] = attended[0].transpose(0, 1)
    return out
