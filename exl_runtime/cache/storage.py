"""The memory that holds keys and values, in pages. Knows no tokens: what a page means is the page table's affair."""

import numpy as np
import torch
from torch import Tensor

from ..errors import OutOfMemory
from .geometry import CacheGeometry, free_memory

ALIGNMENT = 64  # bytes; one cache line, and the widest vector register


class KVStorage:
    """`keys` and `values` of every layer, each (layers, pages, page_size, kv_heads, row) in one allocation.

    row is head_dim elements, or the bytes of a quantized head (`ops.kv_quant`), for keys and values separately.
    Everything reads as zero until it is written. On the CPU untouched pages cost no physical memory, so a long
    context is paid for as it fills.
    """

    def __init__(self, geometry: CacheGeometry, pages: int, device: torch.device) -> None:
        """Raises OutOfMemory when `pages` pages do not fit into what is free on `device`."""
        self.geometry = geometry
        self.pages = pages
        self.page_size = geometry.page_size
        self.device = torch.device(device)
        self.nbytes = pages * geometry.bytes_per_page
        shapes = [
            (geometry.layers, pages, geometry.page_size, geometry.kv_heads, length) for length in geometry.row_lengths
        ]
        # Lazily backed memory never fails here but kills the process later: so the check comes first.
        free = free_memory(self.device)
        if self.nbytes > free:
            raise self._too_large(free)
        try:
            self.keys, self.values = (_zeros(shape, geometry.type.dtype, self.device) for shape in shapes)
        except (MemoryError, RuntimeError) as err:  # torch's own out-of-memory errors are RuntimeErrors
            raise self._too_large(free) from err
        self._layers = tuple((self.keys[i], self.values[i]) for i in range(geometry.layers))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Key pages and value pages of one layer, each (pages, page_size, kv_heads, row)."""
        return self._layers[index]

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of the first `tokens` tokens of one page to another, in every layer."""
        for pages in (self.keys, self.values):
            pages[:, target, :tokens] = pages[:, source, :tokens]

    def _too_large(self, free: int) -> OutOfMemory:
        geometry = self.geometry
        fitting = geometry.pages_in(free) * geometry.page_size
        return OutOfMemory(
            f"the key/value cache for {self.pages * geometry.page_size} tokens needs {_size(self.nbytes)}, "
            f"{_size(free)} are free on {self.device}",
            hint=f"{fitting} tokens would fit: lower --context, or choose a smaller cache type (--cache q8)",
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
