"""Token ids to hidden states."""

import torch
from torch import Tensor


class Embedding:
    """A lookup table (vocab, hidden) in its stored dtype; rows come out in the model's working dtype."""

    def __init__(self, table: Tensor, *, scale: float, dtype: torch.dtype) -> None:
        self.table = table
        self.scale = scale
        self.dtype = dtype

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 (T,) -> (T, hidden)."""
        rows = self.table.index_select(0, tokens).to(self.dtype)
        return rows if self.scale == 1.0 else rows.mul_(self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.table.numel() * self.table.element_size()
