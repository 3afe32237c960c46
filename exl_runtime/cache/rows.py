"""Keys and values of single tokens, moved about between pages. Knows slots (page * page_size + offset), no tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .tiers import Pages


def slots_of(pages: Sequence[int], page_size: int, start: int, stop: int) -> list[int]:
    """Where tokens start ... stop - 1 of a sequence in these pages lie."""
    return [pages[place // page_size] * page_size + place % page_size for place in range(start, stop)]


@torch.inference_mode()
def move_rows(kv: Pages, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Copy the keys and values of every layer from `sources` to `targets`, slot by slot: floats and codes alike, to the
    bit. All of a layer is read before any of it is written, so the slots may overlap; `targets` are distinct."""
    assert len(sources) == len(targets), "as many slots as rows"
    places: dict[torch.device, tuple[Tensor, Tensor]] = {}
    for index in range(kv.geometry.layers):
        for pages in kv.layer(index):
            if pages.device not in places:
                places[pages.device] = (
                    torch.tensor(sources, dtype=torch.int64).to(pages.device),
                    torch.tensor(targets, dtype=torch.int64).to(pages.device),
                )
            source, target = places[pages.device]
            rows = pages.view(-1, *pages.shape[2:])
            rows.index_copy_(0, target, rows.index_select(0, source))


@torch.inference_mode()
def write_rows(pages: Tensor, targets: Sequence[int], rows: Tensor) -> None:
    """Put rows (tokens, kv_heads, row) into these slots of one layer's keys or values."""
    pages.view(-1, *pages.shape[2:])[torch.tensor(targets, dtype=torch.int64, device=pages.device)] = rows
