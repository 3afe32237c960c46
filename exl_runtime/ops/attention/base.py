"""What every paged attention computes, whatever the backend: the contract, and nothing else."""

from collections.abc import Callable

from torch import Tensor

# paged_attention(q, k_pages, v_pages, q_starts, kv_lengths, pages, scale, window, softcap) -> Tensor
#
#   q           (T, heads, head_dim) float32 | float16 | bfloat16: the new tokens of all S sequences, one after another
#   k_pages     (P, page_size, kv_heads, head_dim) float32 | float16 | bfloat16; heads is a multiple of kv_heads and
#               query head h reads key/value head h // (heads / kv_heads)
#               or uint8 (P, page_size, kv_heads, row_bytes): quantized, see `ops.kv_quant`; the width of the codes
#               follows from row_bytes and head_dim. Read a few keys at a time, never expanded over the context
#   v_pages     like k_pages; codes may be of another width
#   q_starts    int32 (S + 1,): sequence s owns rows q_starts[s] to q_starts[s + 1] of q; may be empty
#   kv_lengths  int32 (S,): keys of sequence s, its new tokens included (they are already in the pages)
#   pages       int32 (S, pages per sequence): key j of sequence s lies in page pages[s, j // page_size] at
#               offset j % page_size; entries beyond the last used page are not read
#   scale       multiplies q.k
#   window      w: the query at index i sees keys j with i - w < j <= i; None: all j <= i
#   softcap     c: scores become c * tanh(score / c) after the scale, before the mask; None: unchanged
#
# The query in row r of sequence s has index kv_lengths[s] - (rows of s) + r. Returns (T, heads, head_dim) in q's
# dtype; sums in float32 or wider. A row's result never depends on the other sequences of the batch.
PagedAttention = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int | None, float | None],
    Tensor,
]
