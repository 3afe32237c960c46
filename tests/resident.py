"""How much memory the tests' own process holds."""

import gc
import os
from pathlib import Path

import pytest


def resident() -> int:
    """Bytes of physical memory this process holds; skips the test where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("this system does not tell how much memory a process holds")
    gc.collect()
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
