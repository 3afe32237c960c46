"""Keys and values out of their pages into one piece, for attention that knows no pages."""

from torch import Tensor


def gather(pages: Tensor, table: Tensor, oldest: int, length: int) -> Tensor:
    """Tokens [oldest, length) of a sequence.

    pages (P, page_size, kv_heads, head_dim), table int32 (pages of the sequence,) -> (length - oldest, kv_heads,
    head_dim), a copy.
    """
    size = pages.shape[1]
    first, last = oldest // size, -(-length // size)
    return pages[table[first:last].long()].flatten(0, 1)[oldest - first * size : length - first * size]


def oldest_key(length: int, rows: int, window: int | None) -> int:
    """The first key that any of the last `rows` of `length` tokens sees."""
    return 0 if window is None else max(0, length - rows - window + 1)
