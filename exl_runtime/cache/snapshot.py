"""Keys and values of one conversation as a file: what its pages hold, and what they hold it of.

    START  image of page 0  image of page 1 ...  index (JSON)  footer

footer   bytes of the index (8), CRC-32 of the index (4), little endian, and END
index    version, `identity` (see `Identity`), `root` and `tokens` (what the chained hashes are made of), and for each
         page its tokens and the CRC-32 of its image. Where layers have windows: `windows` of all layers and, of every
         group of layers, how many first pages are `gone`; the images and pages of the groups follow each other.
         `roll`: pages and sinks of a window that rolled; of its first `gone` pages only the sinks are there, as first
         computed. `more`: what its writer wants to know again

Images as in `tiers.py`, in the machine's byte order. What cannot be used is refused in one line: a file of another
model or cache when it is opened, a damaged page when it is read; what is missing is computed anew. Writes no file:
`pieces` gives the bytes.
"""

import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StorageError
from .geometry import CacheGeometry
from .pools import Hit, Pools
from .prefix import Node, chain, pack, root_key
from .tiers import Pages, Part, Tier, read_page
from .window import Roll

START = b"exl-kv-pages 1\n\0"
END = b"exl-kv-end\n"
FOOTER = struct.Struct("<QI")
VERSION = 1
MOST_INDEX = 64 << 20  # bytes; far above any conversation
DIGEST = 16  # bytes of a key


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What has to be the same for keys and values to mean the same.

    model     hash of what was loaded        computed  whose kernels, with which element type and accuracy
    cache     type of keys and values        order     of the bytes of a number
    """

    model: str
    computed: str
    cache: str
    page_size: int
    layers: int
    kv_heads: int
    head_dim: int
    order: str = sys.byteorder

    @classmethod
    def of(cls, model: str, computed: str, geometry: CacheGeometry) -> "Identity":
        """For pages of this geometry."""
        return cls(
            model=model,
            computed=computed,
            cache=geometry.type.name,
            page_size=geometry.page_size,
            layers=geometry.layers,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
        )


DIFFERENCES = {
    "model": "made with another model, or another version of this one",
    "computed": "made with other kernels or settings ({theirs}, not {ours})",
    "cache": "made with the cache type {theirs}, not {ours}",
    "page_size": "made with pages of {theirs} tokens, not {ours}",
}


@dataclass(frozen=True, slots=True)
class Contents:
    """A prefix in the cache: `tokens` under `root`, and in every pool the `pages` that hold them, all of them full but
    the last; the first `gone` are not there, but for the sinks of a `roll`. more: see `Snapshot.more`."""

    root: bytes
    tokens: Sequence[int]
    pages: Sequence[Sequence[int]]
    gone: Sequence[int] = (0,)
    roll: Roll | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        """Pages that are not there, of every group of layers."""
        return [gone - (0 if self.roll is None else self.roll.sinks) for gone in self.gone]


def longest_contents(pools: Pools, roots: Iterable[bytes], tokens: Sequence[int]) -> tuple[Contents, Hit]:
    """The longest beginning of `tokens` in the cache under one of these roots, and what was acquired of it."""
    best, kept = Contents(root_key(0), (), ((),)), Hit([], ())
    for root in roots:
        hit = pools.match(tokens, root=root)
        count = pools.reached(hit)
        if count > len(best.tokens):
            hit, kept = kept, hit
            best = Contents(root, tuple(tokens[:count]), [h.pages for h in kept.held], [h.gone for h in kept.held])
        pools.give_up(hit)
    return best, kept


def snapshot_bytes(geometry: CacheGeometry, tokens: int, gone: Sequence[int] = (0,)) -> int:
    """About how large the file for that many tokens is: exact but for the index, which takes some bytes a token.
    `gone`: see `Contents.missing`."""
    size, total = geometry.page_size, tokens * 6 + 512
    for group, pages in zip(geometry.groups, gone, strict=True):
        total += (tokens - pages * size) * geometry.bytes_of(group) // size + (geometry.pages_for(tokens) - pages) * 40
    return total


def pieces(kv: Pages, contents: Contents, identity: Identity) -> Iterator[bytes | memoryview]:
    """The bytes of a snapshot. The pages must be held until the last piece was taken."""
    size = kv.geometry.page_size
    pages = []
    yield START
    for group, (held, gone) in enumerate(zip(contents.pages, contents.gone, strict=True)):
        part = Part.of(kv, group)
        for number, page in enumerate(held):
            if (0 if contents.roll is None else contents.roll.sinks) <= number < gone:
                continue
            count = min(size, len(contents.tokens) - number * size)
            image = memoryview(read_page(part, page, count).numpy())
            pages.append({"tokens": count, "sum": zlib.crc32(image)})
            yield image
    index = {
        "version": VERSION,
        "identity": asdict(identity),
        "root": contents.root.hex(),
        "tokens": list(contents.tokens),
        "pages": pages,
    }
    if kv.geometry.windows:
        index["windows"] = kv.geometry.windows
    if kv.geometry.windows or contents.roll is not None:
        index["gone"] = list(contents.gone)
    if contents.roll is not None:
        index["roll"] = [contents.roll.pages, contents.roll.sinks]
    if contents.more:
        index["more"] = dict(contents.more)
    text = json.dumps(index, separators=(",", ":")).encode("ascii")
    yield text
    yield FOOTER.pack(len(text), zlib.crc32(text)) + END


class Snapshot:
    """An open snapshot. Removing or replacing the file does not touch an open one.

    tiers  for every group of layers, to be asked for its pages
    held   tokens in it
    more   what its writer wanted to be known again: checked by nobody here
    """

    def __init__(self, path: Path, descriptor: int, index: dict[str, Any], geometry: CacheGeometry) -> None:
        """Use `open`."""
        self.path = path
        self.nbytes = os.fstat(descriptor).st_size
        self.held = len(index["tokens"])
        self.root = bytes.fromhex(index["root"])
        self.more: dict[str, Any] = index.get("more", {})
        self._descriptor = descriptor
        sums, offset = iter(index["pages"]), len(START)
        tiers = []
        roll = Roll(*index["roll"], geometry.page_size) if "roll" in index else None
        for group, gone in zip(geometry.groups, index.get("gone", (0,)), strict=True):
            tier = DiskTier(self)
            for slot, node in enumerate(_nodes(self.root, index["tokens"], geometry.page_size, roll)):
                if (0 if roll is None else roll.sinks) <= slot < gone:
                    continue
                length = node.tokens * geometry.bytes_of(group) // geometry.page_size
                tier.put(slot, node, (offset, length, next(sums)["sum"]))
                offset += length
            tiers.append(tier)
        self.tiers = tuple(tiers)

    @classmethod
    def open(cls, path: Path, identity: Identity, geometry: CacheGeometry) -> "Snapshot":
        """Raises StorageError in one line: no snapshot, damaged, cut short, or of another model or cache."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise StorageError(f"{path.name}: keys and values cannot be read: {err.strerror or err}") from err
        try:
            index = _index(path, descriptor)
            _check(path, descriptor, index, identity, geometry)
            return cls(path, descriptor, index, geometry)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Let go of the file; there is nothing in it any more."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        for tier in self.tiers:
            tier.clear()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, image: Tensor) -> bool:
        """Fill `image`, uint8 (n,), from there on. False where the file ends before; raises OSError."""
        view, done = memoryview(image.numpy()), 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                return False
            done += count
        return True


class DiskTier(Tier):
    """The pages of one group of layers in a snapshot."""

    name = "disk"

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        self._snapshot = snapshot
        self._places: dict[int, tuple[int, int, int]] = {}  # offset, bytes, sum

    def put(self, slot: int, node: Node, place: tuple[int, int, int]) -> None:
        """The image of this page lies there."""
        self._tree.add(slot, node.parent, node.packed, node.key)
        self._places[slot] = place

    def node(self, slot: int) -> Node | None:
        """What page `slot` of the conversation holds; None where it is not there, or turned out to be damaged."""
        return self._tree.nodes.get(slot)

    def _loader(self, slot: int) -> Callable[[], Sequence[Tensor]]:
        return lambda: (self._read(slot),)

    def _read(self, slot: int) -> Tensor:
        offset, length, wanted = self._places[slot]
        image = torch.empty(length, dtype=torch.uint8)
        try:
            whole = self._snapshot.read(offset, image)
        except OSError as err:
            self._tree.remove(slot)
            raise self._broken(slot, err.strerror or str(err)) from err
        if not whole or zlib.crc32(memoryview(image.numpy())) != wanted:
            self._tree.remove(slot)
            raise self._broken(slot, "it is damaged")
        return image

    def _broken(self, slot: int, why: str) -> StorageError:
        name = self._snapshot.path.name
        return StorageError(f"{name}: page {slot} of the keys and values: {why}; computing from there on")


def _nodes(root: bytes, tokens: Sequence[int], size: int, roll: Roll | None) -> Iterator[Node]:
    """What the pages of a conversation hold."""
    parent = root
    for number in range(-(-len(tokens) // size)):
        if roll is not None and roll.gone(number):
            parent = roll.mark(parent)
        packed = pack(tokens[number * size : (number + 1) * size])
        key = chain(parent, packed) if (number + 1) * size <= len(tokens) else None
        yield Node(parent, packed, key, number == 0)
        parent = key or b""


def _index(path: Path, descriptor: int) -> dict[str, Any]:
    """What stands at the end of the file, if it is whole."""
    size, tail = os.fstat(descriptor).st_size, FOOTER.size + len(END)
    if os.pread(descriptor, len(START), 0) != START:
        raise _refused(path, "not a snapshot of keys and values, or one of another version")
    end = os.pread(descriptor, tail, max(0, size - tail))
    if size < len(START) + tail or not end.endswith(END):
        raise _refused(path, "cut short")
    length, wanted = FOOTER.unpack(end[: FOOTER.size])
    if length > min(MOST_INDEX, size - len(START) - tail):
        raise _refused(path, "damaged")
    text = os.pread(descriptor, length, size - tail - length)
    if len(text) != length or zlib.crc32(text) != wanted:
        raise _refused(path, "damaged")
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise _refused(path, "damaged") from err
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise _refused(path, "of another version")
    return index


def _check(path: Path, descriptor: int, index: dict[str, Any], identity: Identity, geometry: CacheGeometry) -> None:
    """Refuse what is not ours, and what does not add up."""
    theirs, ours = index.get("identity"), asdict(identity)
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        raise _refused(path, "damaged")
    for name, value in ours.items():
        if theirs[name] != value:
            text = DIFFERENCES.get(name, "made with another model or machine")
            raise _refused(path, text.format(theirs=str(theirs[name])[:60], ours=value))
    tokens, pages, root = index.get("tokens"), index.get("pages"), index.get("root")
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
        raise _refused(path, "damaged")
    windows, gone = index.get("windows", []), index.get("gone", [0])
    if windows != list(geometry.windows):
        raise _refused(path, "made where other tokens stay in sight of the layers (another --context)")
    size, groups = geometry.page_size, geometry.groups
    counts = [size] * (len(tokens) // size) + ([len(tokens) % size] if len(tokens) % size else [])
    if not isinstance(gone, list) or len(gone) != len(groups) or not all(type(n) is int and n >= 0 for n in gone):
        raise _refused(path, "damaged")
    roll = index.get("roll", [])
    if (
        not isinstance(roll, list)
        or len(roll) not in (0, 2)
        or not all(type(n) is int and 0 < n < 1 << 31 for n in roll)
    ):
        raise _refused(path, "damaged")
    if not isinstance(index.get("more", {}), dict) or (roll and roll[1] > min(gone)):
        raise _refused(path, "damaged")
    sinks = roll[1] if roll else 0
    kept = [[*counts[:sinks], *counts[max(first, sinks) :]] for first in gone]
    good = (
        isinstance(root, str)
        and len(root) == 2 * DIGEST
        and set(root) <= set("0123456789abcdef")
        and isinstance(pages, list)
        and all(isinstance(page, dict) and type(page.get("sum")) is int for page in pages)
        and [page.get("tokens") for page in pages] == [count for group in kept for count in group]
    )
    if not good:
        raise _refused(path, "damaged")
    room = os.fstat(descriptor).st_size - len(START) - FOOTER.size - len(END)
    held = zip(groups, kept, strict=True)
    if sum(sum(counts) * geometry.bytes_of(group) // size for group, counts in held) > room:
        raise _refused(path, "cut short")


def _refused(path: Path, why: str) -> StorageError:
    return StorageError(
        f"{path.name}: {why}; keys and values are computed anew", hint="/kv save writes a new one, /kv drop removes it"
    )
