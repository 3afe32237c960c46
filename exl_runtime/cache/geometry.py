"""How large keys and values are, and how much memory is there for them. Knows numbers only: no pages, no requests."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UsageError
from .types import CacheType

PAGE_SIZE = 256  # tokens of one page


@dataclass(frozen=True, slots=True)
class Group:
    """The layers that see the same part of a sequence, and so share its pages. window: tokens, None: all of it."""

    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """The shape of the keys and values of one model; every layer has the same.

    type       how a key or a value is held
    page_size  tokens of one page; anything but the default is for tests
    windows    of every layer, how many of the last tokens it sees, None for all; (): all layers see all
    """

    layers: int
    kv_heads: int
    head_dim: int
    type: CacheType
    page_size: int = PAGE_SIZE
    windows: tuple[int | None, ...] = ()

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

    @property
    def groups(self) -> tuple[Group, ...]:
        """Every layer in one of them; those that see all come first, then the widest windows."""
        windows = self.windows or (None,) * self.layers
        assert len(windows) == self.layers, "a window for every layer, or none at all"
        kinds = sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
        return tuple(Group(kind, tuple(i for i, window in enumerate(windows) if window == kind)) for kind in kinds)

    def bytes_of(self, group: Group) -> int:
        """One page of the layers of a group."""
        return self.bytes_per_page // self.layers * len(group.layers)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence occupy."""
        return -(-tokens // self.page_size)

    def pages_held(self, group: Group, tokens: int, new: int) -> int:
        """Most pages that a sequence of `tokens` tokens holds in a group at a time, computed `new` tokens at a time."""
        return min(self.pages_for(tokens), pages_seen(group.window, new, self.page_size, self.pages_for(tokens)))

    def pages_in(self, nbytes: int) -> int:
        """Whole pages that fit into `nbytes` bytes."""
        return max(0, nbytes) // self.bytes_per_page


def first_seen(window: int | None, length: int, page_size: int) -> int:
    """The first page of a sequence that the token behind its first `length` ones sees, and so all later ones."""
    return 0 if window is None else max(0, length - window + 1) // page_size


def pages_seen(window: int | None, new: int, page_size: int, most: int) -> int:
    """Most pages on which `new` tokens in a row and all that they see lie; without a window that is `most`."""
    return most if window is None else (window + new - 3) // page_size + 2


def useful_window(window: int | None, context: int, page_size: int) -> int | None:
    """`window`, or None where it sees so much of a context that keeping less would not pay, or not be safe.

    A sequence that rolls past its context (`window.Roll`) loses one page, and its sinks, at most three eighths of the
    pages, move up by as much: so far behind a window that they never come into sight again.
    """
    pages = context // page_size
    hidden = (max(1, pages * 3 // 8) + 1) * page_size
    return window if window is not None and window + hidden <= pages * page_size else None


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
