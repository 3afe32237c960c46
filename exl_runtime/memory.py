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
# of experts has tens of thousands of small matrices.
LEAST = 2 * HUGE


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
