"""Storing new keys and values in the pages of the cache, in plain torch."""

from torch import Tensor


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write token row t into slot slots[t] = page * page_size + offset, rounding to the dtype of the pages.

    k, v              (T, kv_heads, head_dim)
    k_pages, v_pages  (pages, page_size, kv_heads, head_dim), contiguous, written in place
    slots             int64 (T,), all different
    """
    # view, never reshape: a copy would swallow the write.
    k_pages.view(-1, *k_pages.shape[2:]).index_copy_(0, slots, k.to(k_pages.dtype))
    v_pages.view(-1, *v_pages.shape[2:]).index_copy_(0, slots, v.to(v_pages.dtype))
