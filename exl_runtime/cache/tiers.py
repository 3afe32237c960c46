"""Where the content of pages goes when they are reused, and comes back from: host memory, and snapshots on a disk.

The page table asks `Tiers` for what follows a prefix that it has no page for, and hands over what it is about to
overwrite. An entry is found by the same chained hashes as a page. Its `image` holds the first n tokens of a page: for
each layer in order the keys, then the values, each (n, kv_heads, row) as in `KVStorage`. Knows no requests.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ExlError, UsageError
from .geometry import CacheGeometry, free_host_memory
from .prefix import TOKEN_BYTES, Node, PrefixTree

log = logging.getLogger(__name__)
AUTO_SHARE = 4  # "auto": this part of the host memory that is free,
AUTO_MOST = 16 << 30  # and at most these bytes


class Pages(Protocol):
    """The memory behind the pages: a `KVStorage`, or several that stand in for one."""

    geometry: CacheGeometry

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Key pages and value pages of one layer, each (pages, page_size, kv_heads, row)."""


@dataclass(frozen=True, slots=True)
class Part:
    """The pages of some layers of a storage."""

    geometry: CacheGeometry
    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, kv: Pages, group: int) -> "Part":
        """The layers of one group."""
        layers = kv.geometry.groups[group].layers
        return cls(replace(kv.geometry, layers=len(layers), windows=()), tuple(kv.layer(index) for index in layers))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """See `Pages`."""
        return self.layers[index]


def host_limit(requested: int | str, device: torch.device) -> int:
    """Bytes for pages in host memory; 0: none. "auto": a quarter of what is free beside a GPU, none without one.

    On the CPU the pages themselves lie in host memory: a second place would hold nothing that more pages do not.
    Raises UsageError.
    """
    check_host_cache(requested)
    if isinstance(requested, int):
        return requested
    return 0 if device.type == "cpu" else min(free_host_memory() // AUTO_SHARE, AUTO_MOST)


def check_host_cache(requested: int | str) -> None:
    """Raise UsageError for what is neither bytes nor "auto"."""
    right = requested == "auto" or (type(requested) is int and requested >= 0)
    if not right:
        raise UsageError(f"host_cache is {requested!r}", hint='give bytes from 0 up, or "auto"')


def read_page(kv: Pages, page: int, tokens: int) -> Tensor:
    """uint8 (tokens * bytes_per_token) on the CPU: the image of the first `tokens` tokens of a page."""
    parts = _parts(kv, page, tokens)
    image = torch.empty(sum(part.numel() for part in parts), dtype=torch.uint8)
    for part, piece in zip(parts, image.split([part.numel() for part in parts]), strict=True):
        piece.copy_(part)
    return image


def write_page(kv: Pages, page: int, tokens: int, image: Tensor) -> None:
    """Fill the first `tokens` tokens of a page from an image of as many or more."""
    parts = _parts(kv, page, tokens)
    stored = image.numel() // kv.geometry.bytes_per_token
    assert stored >= tokens and image.numel() == stored * kv.geometry.bytes_per_token, "an image of other pages"
    start = 0
    for part in parts:
        part.copy_(image[start : start + part.numel()])
        start += part.numel() // tokens * stored


def _parts(kv: Pages, page: int, tokens: int) -> list[Tensor]:
    """uint8 views of the first `tokens` tokens of a page, in the order of an image."""
    layers = range(kv.geometry.layers)
    return [pages[page, :tokens].view(-1).view(torch.uint8) for i in layers for pages in kv.layer(i)]


@dataclass(frozen=True, slots=True)
class Found:
    """An entry of a tier: what it holds, of which the first `shared` tokens are wanted. `load` may raise ExlError."""

    tier: "Tier"
    node: Node
    shared: int
    load: Callable[[], Sequence[Tensor]]


class Tier:
    """Entries found by their keys, or by the beginning they share. `tokens`: what came back from here so far."""

    name = ""

    def __init__(self) -> None:
        self.tokens = 0
        self._tree = PrefixTree()

    def find(self, parent: bytes, packed: bytes, key: bytes | None) -> Found | None:
        """The full page `key`, or the longest beginning of `packed` behind `parent`."""
        slot = None if key is None else self._tree.find(key)
        found = (slot, len(packed) // TOKEN_BYTES) if slot is not None else None
        if found is None and key is None:
            found = self._tree.longest(parent, packed)
        return None if found is None else Found(self, self._tree.nodes[found[0]], found[1], self._loader(found[0]))

    def clear(self) -> None:
        """Forget all entries."""
        self._tree = PrefixTree()

    def _loader(self, slot: int) -> Callable[[], Sequence[Tensor]]:
        """What returns the images of an entry, one for each storage this tier serves, even after it was dropped."""
        raise NotImplementedError


class HostTier(Tier):
    """Entries in host memory, at most `limit` bytes; the least recently used go first."""

    name = "host"

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.nbytes = 0
        self.dropped = 0  # entries that made room for others
        self._images: dict[int, list[Tensor]] = {}  # oldest first
        self._next = 0

    def __len__(self) -> int:
        return len(self._images)

    def put(self, node: Node, size: int, read: Callable[[], list[Tensor]]) -> None:
        """Keep what a page holds: `size` bytes, read only when they are not here yet and fit."""
        if size > self.limit or self._knows(node):
            return
        for slot in self._beginnings(node):
            self._drop(slot)
        while self.nbytes + size > self.limit:
            self._drop(next(iter(self._images)))
            self.dropped += 1
        slot, self._next = self._next, self._next + 1
        self._images[slot] = read()
        self.nbytes += size
        self._tree.add(slot, node.parent, node.packed, node.key)

    def clear(self) -> None:
        """See `Tier.clear`."""
        super().clear()
        self._images.clear()
        self.nbytes = 0

    def _knows(self, node: Node) -> bool:
        """Whether an entry already holds all of it; that one counts as used now."""
        for slot, other in self._tree.children(node.parent):
            if other.packed.startswith(node.packed):
                self._images[slot] = self._images.pop(slot)
                return True
        return False

    def _beginnings(self, node: Node) -> list[int]:
        """Entries that hold only a beginning of it."""
        return [
            slot
            for slot, other in self._tree.children(node.parent)
            if other.key is None and node.packed.startswith(other.packed)
        ]

    def _drop(self, slot: int) -> None:
        self.nbytes -= sum(image.numel() for image in self._images.pop(slot))
        self._tree.remove(slot)

    def _loader(self, slot: int) -> Callable[[], Sequence[Tensor]]:
        images = self._images[slot] = self._images.pop(slot)  # used now
        return lambda: images


def tiers_of(stores: Sequence[Pages], *, host_bytes: int = 0) -> "list[Tiers]":
    """What lies below the page table of every group of layers. `stores` have the same groups; each group gets the share
    of `host_bytes` that its layers have of all."""
    groups = stores[0].geometry.groups
    assert all(len(store.geometry.groups) == len(groups) for store in stores), "stores with other groups"
    if len(groups) == 1:
        return [Tiers(stores, host_bytes=host_bytes)]
    layers = stores[0].geometry.layers
    shares = [host_bytes * len(group.layers) // layers for group in groups]
    return [
        Tiers([Part.of(store, number) for store in stores], host_bytes=share) for number, share in enumerate(shares)
    ]


class Tiers:
    """What lies below a page table. `stores`: the memory behind the pages, first that of the model itself; others
    (of a draft model) share its page numbers, and what a tier does not know of theirs stays as it is."""

    def __init__(self, stores: Sequence[Pages], *, host_bytes: int = 0) -> None:
        self.host = HostTier(host_bytes)
        self.others: list[Tier] = []  # asked after the host, the last one first
        self._stores = list(stores)
        self._gone: dict[str, int] = {}

    def spill(self, page: int, node: Node) -> None:
        """`page`, which holds `node`, is about to be overwritten."""
        if self.host.limit:
            tokens = node.tokens
            size = sum(store.geometry.bytes_per_token for store in self._stores) * tokens
            self.host.put(node, size, lambda: [read_page(store, page, tokens) for store in self._stores])

    def find(self, parent: bytes, packed: bytes, key: bytes | None, *, beyond: int = 0) -> Found | None:
        """The full page `key` with the tokens `packed`; without a key, what shares most of its first tokens with
        `packed`, more than `beyond`. None: no tier has such a thing."""
        best = None
        for tier in (self.host, *reversed(self.others)):
            found = tier.find(parent, packed, key)
            if found is not None and found.shared > beyond:
                best, beyond = found, found.shared
        return best

    def restore(self, found: Found, page: int) -> bool:
        """Bring an entry back into `page`. False when it cannot be read; the page then holds nothing."""
        try:
            images = found.load()
        except ExlError as err:
            log.warning("%s", err.problem)
            return False
        for store, image in zip(self._stores, images, strict=False):
            write_page(store, page, found.shared, image)
        found.tier.tokens += found.shared
        return True

    def tokens_from(self, name: str) -> int:
        """Tokens that came back from the tiers of this name, those that are gone included."""
        return self._gone.get(name, 0) + sum(tier.tokens for tier in (self.host, *self.others) if tier.name == name)

    def add(self, tier: Tier) -> None:
        """Ask this one too."""
        self.others.append(tier)

    def remove(self, tier: Tier) -> None:
        """Ask this one no more."""
        self.others.remove(tier)
        self._gone[tier.name] = self._gone.get(tier.name, 0) + tier.tokens

    def clear(self) -> None:
        """Forget everything; snapshots stay on their disk."""
        self.host.clear()
        for tier in list(self.others):
            self.remove(tier)
