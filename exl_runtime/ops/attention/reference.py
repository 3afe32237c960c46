"""Paged attention in plain torch, any device, sequence by sequence. See `base.py` for the contract."""

import torch
from torch import Tensor

SCORES = 1 << 22  # float32 scores held at a time: bounds the memory of a long prefill


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
    """The definition of attention over the paged cache; arguments as in `base.PagedAttention`."""
    out = torch.empty_like(q)
    starts = q_starts.tolist()
    page_size = k_pages.shape[1]
    for s, length in enumerate(kv_lengths.tolist()):
        start, stop = starts[s], starts[s + 1]
        if start == stop:
            continue
        held = pages[s, : -(-length // page_size)].long()
        keys = k_pages[held].flatten(0, 1)[:length]
        values = v_pages[held].flatten(0, 1)[:length]
        out[start:stop] = _attend(q[start:stop], keys, values, scale, window, softcap)
    return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One sequence: q (n, heads, head_dim) are the last n of its L tokens, keys and values (L, kv_heads, head_dim)."""
    n, heads, head_dim = q.shape
    length, kv_heads = keys.shape[:2]
    step = max(1, SCORES // (heads * length))
    parts = []
    for start in range(0, n, step):
        stop = min(start + step, n)
        first, last = length - n + start, length - n + stop  # indices of these queries
        oldest = 0 if window is None else max(0, first - window + 1)
        # (kv_heads, queries * heads per kv head, head_dim) against (kv_heads, head_dim, keys)
        grouped = q[start:stop].float().reshape(stop - start, kv_heads, -1, head_dim).transpose(0, 1)
        k = keys[oldest:last].float().permute(1, 2, 0)
        v = values[oldest:last].float().transpose(0, 1)
        scores = (grouped.flatten(1, 2) @ k).view(kv_heads, stop - start, -1, last - oldest) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(first, last, device=q.device)[:, None] - torch.arange(oldest, last, device=q.device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores.masked_fill_(hidden[None, :, None], float("-inf"))
        attended = torch.softmax(scores, dim=-1).flatten(1, 2) @ v
        attended = attended.view(kv_heads, stop - start, -1, head_dim).transpose(0, 1)
        parts.append(attended.reshape(stop - start, heads, head_dim).to(q.dtype))
    return torch.cat(parts)
