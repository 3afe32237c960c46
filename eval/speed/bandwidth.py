"""What the memory of this machine gives here and now, and how large its caches are.

Bandwidth differs between minutes on shared and virtual machines, so it is measured beside what it is compared with.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from exl_runtime.cache.geometry import free_memory
from exl_runtime.errors import OutOfMemory
from exl_runtime.memory import empty_bytes

from .timers import Timer, timer_for

LLC_GUESS = 32 << 20  # bytes, where the system does not tell
LEAST_BYTES = 512 << 20
PASSES = 3
log = logging.getLogger(__name__)


class Bandwidth:
    """Reads a buffer of at least eight times the last-level cache, on the CPU with the threads torch has.

    On a GPU one half of the buffer is copied to the other, and both directions count, as vendors do.
    """

    def __init__(self, device: torch.device, *, timer: Timer | None = None, nbytes: int | None = None) -> None:
        """Raises OutOfMemory when there is no room for the buffer. `nbytes` is for tests."""
        wanted = max(LEAST_BYTES, 8 * llc_bytes(device)) if nbytes is None else nbytes
        if free_memory(device) < wanted * 1.1:
            raise OutOfMemory(
                f"measuring the bandwidth of memory takes {wanted >> 20} MiB, {free_memory(device) >> 20} are free",
                hint="close other programs",
            )
        self.device = device
        self.nbytes = wanted // 16 * 16
        self._timer = timer or timer_for(device)
        if device.type == "cpu":
            self._buffer = empty_bytes(self.nbytes)
        else:
            self._buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        self._buffer.zero_()  # memory that nobody wrote to is one shared page of zeros
        self._readers = self._cpu() if device.type == "cpu" else (self._copy,)

    def measure(self) -> float:
        """Bytes per second of the best of a few passes."""
        return self.nbytes / min(self._timer(reader) for reader in self._readers for _ in range(PASSES))

    def _cpu(self) -> tuple[Callable[[], object], ...]:
        # Which one keeps up with the memory depends on the machine and on torch; none writes anything.
        return self._buffer.view(torch.float32).sum, self._buffer.view(torch.int64).amax

    def _copy(self) -> None:
        half = self.nbytes // 2
        self._buffer[:half].copy_(self._buffer[half : 2 * half])


def llc_bytes(device: torch.device, root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the last-level cache of `device` in bytes, or a guess where the system does not tell."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", LLC_GUESS)) or LLC_GUESS
    found = []
    for index in sorted(root.glob("index*")):
        try:
            level = int((index / "level").read_text())
            found.append((level, _size((index / "size").read_text().strip())))
        except (OSError, ValueError):
            continue
    if not found:
        log.info("the system does not tell the size of the last-level cache; taking %d MiB", LLC_GUESS >> 20)
    return max(found)[1] if found else LLC_GUESS


def _size(text: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
    return int(text) if unit is None else int(text[:-1]) * unit
