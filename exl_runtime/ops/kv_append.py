"""Storing new keys and values in the pages of the cache, in plain torch."""

import torch
from torch import Tensor

from .kv_quant import bits_of, quantize


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write token row t into slot slots[t] = page * page_size + offset, rounding or quantizing as the pages want it.

    k, v              (T, kv_heads, head_dim)
    k_pages, v_pages  (pages, page_size, kv_heads, head_dim), contiguous, written in place; or uint8
                      (pages, page_size, kv_heads, row_bytes), rows of codes (`ops.kv_quant`) of any width each
    slots             int64 (T,), all different
    """
    for new, pages in ((k, k_pages), (v, v_pages)):
        quantized = pages.dtype == torch.uint8
        rows = quantize(new, bits_of(pages, new.shape[-1])) if quantized else new.to(pages.dtype)
        # view, never reshape: a copy would swallow the write.
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, rows)
