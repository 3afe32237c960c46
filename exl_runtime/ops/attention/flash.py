"""Prefill by flash-attn 2, over pages where their size allows it, else over gathered keys."""

import torch
from torch import Tensor

from .choose import FLASH_PAGE
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
    """Arguments as in `base.PagedAttention`, with q and the pages of one dtype, float16 or bfloat16.

    The whole ragged batch in one call; only gathering reads the lengths from the device.
    """
    from flash_attn import flash_attn_varlen_func

    page_size, table = k_pages.shape[1], None
    if page_size % FLASH_PAGE == 0:
        k, v, table = k_pages, v_pages, pages
        lengths, longest = kv_lengths, pages.shape[1] * page_size
    else:
        starts = q_starts.tolist()
        parts = []
        for s, length in enumerate(kv_lengths.tolist()):
            oldest = oldest_key(length, starts[s + 1] - starts[s], window)
            parts.append([gather(held, pages[s], oldest, length) for held in (k_pages, v_pages)])
        k, v = (torch.cat(some) for some in zip(*parts, strict=True))
        counts = [len(keys) for keys, _ in parts]
        lengths, longest = torch.tensor(counts, dtype=torch.int32, device=q.device), max(counts)
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=q_starts,
        cu_seqlens_k=ends,
        max_seqlen_q=q.shape[0],
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,  # aligned at the last key
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=0.0 if softcap is None else softcap,
        block_table=table,
    )
