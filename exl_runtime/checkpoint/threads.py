"""Threads that read files: enough of them to fill the memory's pace, which one alone does not."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

MOST_READERS = 8


def usable_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_pieces(total: int, piece: int, one: Callable[[int, int], bool]) -> bool:
    """Call one(begin, end) for all pieces of [0, total) by several threads; False as soon as one of them is.

    An exception of a call passes through; pieces that nobody has begun by then are left out.
    """
    starts = range(0, total, piece)
    if len(starts) <= 1:
        return all(one(begin, min(begin + piece, total)) for begin in starts)
    with ThreadPoolExecutor(min(MOST_READERS, usable_processors(), len(starts)), "exl-read") as readers:
        try:
            return all(readers.map(lambda begin: one(begin, min(begin + piece, total)), starts))
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
