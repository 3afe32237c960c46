"""Large uninitialised buffers on huge pages. Knows nothing of what is kept in them.

The first touch of fresh memory costs a page fault every 4 KiB, which in a virtual machine is several times slower than
reading a file that is cached; and a token walks over all weights, where small pages cost address translations. Linux
gives pages of 2 MiB to those who ask (transparent huge pages, setting "madvise", the usual default).
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 2 << 20
# Smaller ones come from the heap: every mapping counts against a limit of the system (65530 by default), and a mixture
# of experts has tens of thousands of small matrices. An Arena puts those together.
LEAST = 2 * HUGE
CHUNK = 256 << 20  # bytes of a mapping of an arena; what is never touched of it takes no memory
ALIGN = 64  # bytes: a line of a first-level cache, the unit the kernels' layouts are made of
KEPT = 16 << 20  # bytes that scratch memory keeps between two users, at the most


def empty_bytes(nbytes: int) -> Tensor:
    """A CPU tensor uint8 (nbytes,), contents undefined. Raises RuntimeError or MemoryError where there is no room."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if nbytes < LEAST or advice is None:
        return torch.empty(nbytes, dtype=torch.uint8)
    try:
        room = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory, or no mapping left: torch decides which, and has its own words for it
        return torch.empty(nbytes, dtype=torch.uint8)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    # A kernel without huge pages refuses; the buffer is as good then, only slower. The last page is asked for only if
    # it is at least half full: what lies behind the buffer would be memory wasted.
    with suppress(OSError):
        room.madvise(advice, start, (nbytes + HUGE // 2) // HUGE * HUGE)
    return whole[start : start + nbytes]


class Arena:
    """Buffers for things that stay together to the end, back to back on huge pages, small ones as well.

    A buffer is a view: the mapping it lies in lives as long as the last of them. Nothing is given back before.
    """

    def __init__(self, expected: int = CHUNK) -> None:
        """`expected` bytes will be asked for, roughly; less than that is mapped when it is less than a chunk."""
        self._next = max(HUGE, min(expected + expected // 16, CHUNK))
        self._rest = torch.empty(0, dtype=torch.uint8)
        self.nbytes = 0  # handed out, what alignment takes included

    def take(self, nbytes: int) -> Tensor:
        """uint8 (nbytes,), contents undefined, beginning at a multiple of ALIGN. Raises as `empty_bytes` does."""
        if nbytes > self._rest.numel():
            room = empty_bytes(max(nbytes, self._next) + ALIGN)
            self._rest = room[-room.data_ptr() % ALIGN :]
            self._next = CHUNK
        taken = min(self._rest.numel(), -(-nbytes // ALIGN) * ALIGN)
        buffer, self._rest = self._rest[:nbytes], self._rest[taken:]
        self.nbytes += taken
        return buffer


class Scratch:
    """One buffer that is lent again and again: whoever borrows next overwrites it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def lend(self, nbytes: int) -> Tensor:
        """uint8 (nbytes,), contents undefined, valid until the next call. Raises as `empty_bytes` does."""
        if nbytes > self._buffer.numel() or self._buffer.numel() > max(KEPT, 2 * nbytes):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = empty_bytes(max(nbytes, LEAST))
        return self._buffer[:nbytes]
