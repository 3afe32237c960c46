"""Hidden states of all rows through the embedding and through layers, a chunk of rows at a time."""

from collections.abc import Callable

from torch import Tensor

from exl_runtime.config import ModelSpec

from .forward import LayerForward, LayerWeights, embed
from .states import States


def fill(states: States, spec: ModelSpec, table: Tensor, rows: Tensor, chunk: int) -> None:
    """Write the embeddings of rows int64 (rows, length) by `table` (vocab rows, hidden)."""
    for at in range(0, rows.shape[0], chunk):
        states.write(at, embed(spec, table, rows[at : at + chunk].to(table.device)))


def through(
    layer: LayerForward,
    w: LayerWeights,
    before: States,
    after: States,
    chunk: int,
    check: Callable[[Tensor], None] = lambda x: None,
) -> None:
    """Outputs of one layer for all rows of `before`, written to `after`, which may be the same.

    check  sees the outputs of every chunk before they are written
    """
    device = w["input_norm"].device
    for at in range(0, before.rows, chunk):
        x = layer(before.read(at, min(at + chunk, before.rows)).to(device), w)
        check(x)
        after.write(at, x)
