"""How large keys and values are, and how much memory is there for them. Knows numbers only: no pages, no requests."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UsageError
from .types import CacheType

PAGE_SIZE = 256  # tokens of one page


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """The shape of the keys and values of one model; every layer has the same.

    type       how a key or a value is held
    page_size  tokens of one page; anything but the default is for tests
    """

    layers: int
    kv_heads: int
    head_dim: int
    type: CacheType
    page_size: int = PAGE_SIZE

    @property
    def row_lengths(self) -> tuple[int, int]:
        """Elements of type.dtype that one head of keys takes, and one of values."""
        return self.type.row_lengths(self.head_dim)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return self.layers * self.kv_heads * sum(self.row_lengths) * self.type.dtype.itemsize

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence occupy."""
        return -(-tokens // self.page_size)

    def pages_in(self, nbytes: int) -> int:
        """Whole pages that fit into `nbytes` bytes."""
        return max(0, nbytes) // self.bytes_per_page


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`: CUDA's own count, or host memory (see `free_host_memory`)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that can be taken without swapping, and without hitting a container's limit.

    The smallest of MemAvailable and, for every memory cgroup (v1 or v2) this process is in, limit - use. File
    pages that the kernel would drop under pressure count as free. `root` is for tests.
    """
    candidates = [_mem_available(root), *_cgroup_room(root)]
    known = [value for value in candidates if value is not None]
    if not known:
        raise UsageError(
            "cannot tell how much memory is free on this system", hint="give the context length: --context N"
        )
    return max(0, min(known))


def _mem_available(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    names = os.sysconf_names if root == Path("/") else {}
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_room(root: Path) -> list[int]:
    """What is left under every limit between this process's memory cgroup and the top of the hierarchy."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mount = root / "sys/fs/cgroup"
    room = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            top = mount
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = mount / "memory"
        else:
            continue
        # Inside a container the path is often that of the host and does not exist here: its end counts then.
        folder = top / path.strip("/")
        for place in (folder, *folder.parents):
            if (left := _left_in(place, *names)) is not None:
                room.append(left)
            if place == top:
                break
    return room


def _left_in(folder: Path, limit_name: str, use_name: str, droppable_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / use_name).read_text())
        stat = (folder / "memory.stat").read_text().splitlines() if (folder / "memory.stat").exists() else []
    except (OSError, ValueError):
        return None
    if not limit.isdigit() or int(limit) >= 1 << 60:  # "max", or the huge number by which v1 says "no limit"
        return None
    droppable = next((int(line.split()[1]) for line in stat if line.split()[0] == droppable_name), 0)
    return int(limit) - used + droppable
