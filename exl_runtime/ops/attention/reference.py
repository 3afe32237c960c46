"""Paged attention in plain torch, any device, sequence by sequence. See `base.py` for the contract."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kv_quant import bits_of, dequantize

SCORES = 1 << 22  # float32 scores held at a time: bounds the memory of a long prefill
SPAN = 4096  # keys read at a time: bounds the memory of a long context

Reader = Callable[[int, int], tuple[Tensor, Tensor]]  # keys and values of tokens [low, high), float32


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
    page_size, head_dim = k_pages.shape[1], q.shape[-1]
    for s, length in enumerate(kv_lengths.tolist()):
        start, stop = starts[s], starts[s + 1]
        if start == stop:
            continue

        def read(low: int, high: int, held: Tensor = pages[s]) -> tuple[Tensor, Tensor]:
            some = held[low // page_size : -(-high // page_size)].long()
            skip = low % page_size
            first, last = (x[some].flatten(0, 1)[skip : skip + high - low] for x in (k_pages, v_pages))
            return _widen(first, head_dim), _widen(last, head_dim)

        out[start:stop] = _attend(q[start:stop], read, length, scale, window, softcap)
    return out


def _widen(rows: Tensor, head_dim: int) -> Tensor:
    return dequantize(rows, head_dim, bits_of(rows, head_dim)) if rows.dtype == torch.uint8 else rows.float()


def _attend(q: Tensor, read: Reader, length: int, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One sequence: q (n, heads, head_dim) are the last n of its `length` tokens."""
    n, heads = q.shape[:2]
    step = max(1, SCORES // (heads * min(length, SPAN)))
    parts = []
    for start in range(0, n, step):
        stop = min(start + step, n)
        first = length - n + start  # index of the first of these queries
        oldest = 0 if window is None else max(0, first - window + 1)
        parts.append(_attend_some(q[start:stop].float(), read, first, oldest, scale, window, softcap).to(q.dtype))
    return torch.cat(parts)


def _attend_some(
    q: Tensor, read: Reader, first: int, oldest: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """q float32 (n, heads, head_dim) from index `first` on against all keys from `oldest` on, SPAN at a time.

    A softmax over pieces: each piece is weighed against the largest score so far, and what came before is scaled down.
    """
    n, heads, head_dim = q.shape
    last, grouped, top = first + n, None, None
    for low in range(oldest, last, SPAN):
        high = min(low + SPAN, last)
        keys, values = read(low, high)
        kv_heads = keys.shape[1]
        if grouped is None:
            # (kv_heads, queries * heads per kv head, head_dim) against (kv_heads, head_dim, keys)
            grouped = q.reshape(n, kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
            top = torch.full((*grouped.shape[:2], 1), torch.finfo(torch.float32).min, device=q.device)
            total, mixed = torch.zeros_like(top), torch.zeros_like(grouped)
        scores = (grouped @ keys.permute(1, 2, 0)).view(kv_heads, n, -1, high - low) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(first, last, device=q.device)[:, None] - torch.arange(low, high, device=q.device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill_(hidden[None, :, None], float("-inf")).flatten(1, 2)
        highest = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, keep = torch.exp(scores - highest), torch.exp(top - highest)
        total = total * keep + weights.sum(-1, keepdim=True)
        mixed = mixed * keep + weights @ values.transpose(0, 1)
        top = highest
    return (mixed / total).view(kv_heads, n, -1, head_dim).transpose(0, 1).reshape(n, heads, head_dim)
