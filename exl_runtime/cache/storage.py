"""The memory that holds keys and values, in pages. Knows no tokens: what a page means is the page table's affair."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import OutOfMemory
from .geometry import CacheGeometry, free_memory

ALIGNMENT = 64  # bytes; one cache line, and the widest vector register


class KVStorage:
    """`parts`: for every group of layers its keys and values, (layers, pages, page_size, kv_heads, row) each.

    row is head_dim elements, or the bytes of a quantized head (`ops.kv_quant`), for keys and values separately.
    Everything reads as zero until it is written. On the CPU untouched pages cost no physical memory, so a long
    context is paid for as it fills.
    """

    def __init__(self, geometry: CacheGeometry, pages: int | Sequence[int], device: torch.device) -> None:
        """`pages`: of every group of the geometry, or one number for all. Raises OutOfMemory when they do not fit into
        what is free on `device`."""
        groups = geometry.groups
        self.geometry = geometry
        self.counts = (pages,) * len(groups) if isinstance(pages, int) else tuple(pages)
        self.pages = self.counts[0]
        self.page_size = geometry.page_size
        self.device = torch.device(device)
        self.nbytes = sum(geometry.bytes_of(group) * n for group, n in zip(groups, self.counts, strict=True))
        # Lazily backed memory never fails here but kills the process later: so the check comes first.
        free = free_memory(self.device)
        if self.nbytes > free:
            raise self._too_large(free)
        placed = {layer: number for number, group in enumerate(groups) for layer in group.layers}
        self.group_of = [placed[layer] for layer in range(geometry.layers)]  # by layer
        self.parts: list[tuple[Tensor, Tensor]] = []  # of every group, keys and values
        self._layers: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * geometry.layers
        try:
            for group, count in zip(groups, self.counts, strict=True):
                shape = (len(group.layers), count, geometry.page_size, geometry.kv_heads)
                shapes = [(*shape, length) for length in geometry.row_lengths]
                keys, values = (_zeros(one, geometry.type.dtype, self.device) for one in shapes)
                self.parts.append((keys, values))
        except (MemoryError, RuntimeError) as err:  # torch's own out-of-memory errors are RuntimeErrors
            raise self._too_large(free) from err
        for group, (keys, values) in zip(groups, self.parts, strict=True):
            for place, layer in enumerate(group.layers):
                self._layers[layer] = (keys[place], values[place])

    @property
    def keys(self) -> Tensor:
        """Of the first group."""
        return self.parts[0][0]

    @property
    def values(self) -> Tensor:
        """Of the first group."""
        return self.parts[0][1]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Key pages and value pages of one layer, each (pages of its group, page_size, kv_heads, row)."""
        return self._layers[index]

    def copy_page(self, source: int, target: int, tokens: int, group: int = 0) -> None:
        """Copy the keys and values of the first `tokens` tokens of one page to another, in every layer of a group."""
        for pages in self.parts[group]:
            pages[:, target, :tokens] = pages[:, source, :tokens]

    def _too_large(self, free: int) -> OutOfMemory:
        geometry = self.geometry
        hint = "lower --context, or choose a smaller cache type (--cache q8)"
        if len(self.counts) == 1:
            hint = f"{geometry.pages_in(free) * geometry.page_size} tokens would fit: {hint}"
        return OutOfMemory(
            f"the key/value cache for {self.pages * geometry.page_size} tokens needs {_size(self.nbytes)}, "
            f"{_size(free)} are free on {self.device}",
            hint=hint,
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every byte; numpy takes zeroed pages from the system, which come into being when written.
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw)[start : start + nbytes].view(dtype).view(shape)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
