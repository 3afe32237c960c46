"""Token ids to hidden states."""

from torch import Tensor


class Embedding:
    """A lookup table (vocab, hidden) in its stored dtype; rows come out in float32, times `scale`."""

    def __init__(self, table: Tensor, *, scale: float) -> None:
        self.table = table
        self.scale = scale

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 (T,) -> (T, hidden)."""
        rows = self.table.index_select(0, tokens).float()
        return rows if self.scale == 1.0 else rows.mul_(self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.table.numel() * self.table.element_size()
