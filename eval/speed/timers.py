"""Seconds that a piece of work takes, on the processor or on a GPU. Tests put their own timer in place."""

import time
from collections.abc import Callable

import torch

Clock = Callable[[], float]
Timer = Callable[[Callable[[], object]], float]  # runs the work once; seconds from its start to its end


def wall_timer(clock: Clock = time.perf_counter) -> Timer:
    """For work that is done when its call returns."""

    def timed(work: Callable[[], object]) -> float:
        started = clock()
        work()
        return clock() - started

    return timed


def cuda_timer(device: torch.device) -> Timer:
    """For work that is queued on a GPU: by events on the current stream of `device`."""

    def timed(work: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            stop.record()
            torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    return timed


def timer_for(device: torch.device) -> Timer:
    """The timer that `device` needs."""
    return cuda_timer(device) if device.type == "cuda" else wall_timer()


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
