"""Keys and values of one conversation as a file: what its pages hold, and what they hold it of.

    START  image of page 0  image of page 1 ...  index (JSON)  footer

footer   bytes of the index (8), CRC-32 of the index (4), little endian, and END
index    version, `identity` (see `Identity`), `root` and `tokens` (what the chained hashes are made of), and for each
         page its tokens and the CRC-32 of its image

Images as in `tiers.py`, in the machine's byte order. What cannot be used is refused in one line: a file of another
model or cache when it is opened, a damaged page when it is read; what is missing is computed anew. Writes no file:
`pieces` gives the bytes.
"""

import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StorageError
from .geometry import CacheGeometry
from .pools import Hit
from .prefix import Node, chain, pack
from .tiers import Pages, Tier, read_page

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
    the last; the first `gone` are not there."""

    root: bytes
    tokens: Sequence[int]
    pages: Sequence[Sequence[int]]
    gone: Sequence[int] = (0,)


def contents_of(hit: Hit, root: bytes, tokens: Sequence[int]) -> Contents:
    """What was found of `tokens`."""
    pages = [[*match.pages, *([] if match.source is None else [match.source])] for match in hit.matches]
    return Contents(root, tuple(tokens), pages, [match.gone for match in hit.matches])


def snapshot_bytes(geometry: CacheGeometry, tokens: int) -> int:
    """About how large the file for that many tokens is: exact but for the index, which takes some bytes a token."""
    return tokens * geometry.bytes_per_token + geometry.pages_for(tokens) * 40 + tokens * 6 + 512


def pieces(kv: Pages, contents: Contents, identity: Identity) -> Iterator[bytes | memoryview]:
    """The bytes of a snapshot. The pages must be held until the last piece was taken."""
    size = kv.geometry.page_size
    pages = []
    yield START
    for number, page in enumerate(contents.pages[0]):
        count = min(size, len(contents.tokens) - number * size)
        image = memoryview(read_page(kv, page, count).numpy())
        pages.append({"tokens": count, "sum": zlib.crc32(image)})
        yield image
    index = {
        "version": VERSION,
        "identity": asdict(identity),
        "root": contents.root.hex(),
        "tokens": list(contents.tokens),
        "pages": pages,
    }
    text = json.dumps(index, separators=(",", ":")).encode("ascii")
    yield text
    yield FOOTER.pack(len(text), zlib.crc32(text)) + END


class Snapshot(Tier):
    """An open snapshot, to be asked for its pages. Removing or replacing the file does not touch an open one."""

    name = "disk"

    def __init__(self, path: Path, descriptor: int, index: dict[str, Any], geometry: CacheGeometry) -> None:
        """Use `open`."""
        super().__init__()
        self.path = path
        self.nbytes = os.fstat(descriptor).st_size
        self.held = len(index["tokens"])  # tokens in it
        self.root = bytes.fromhex(index["root"])
        self._descriptor = descriptor
        self._places: list[tuple[int, int, int]] = []  # offset, bytes, sum
        parent, done, offset = self.root, 0, len(START)
        for slot, page in enumerate(index["pages"]):
            packed = pack(index["tokens"][done : done + page["tokens"]])
            key = chain(parent, packed) if page["tokens"] == geometry.page_size else None
            self._tree.add(slot, parent, packed, key)
            length = page["tokens"] * geometry.bytes_per_token
            self._places.append((offset, length, page["sum"]))
            parent, done, offset = key or b"", done + page["tokens"], offset + length

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
        self.clear()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def node(self, slot: int) -> Node | None:
        """What page `slot` of the file holds; None once it turned out to be damaged."""
        return self._tree.nodes.get(slot)

    def _loader(self, slot: int) -> Callable[[], Sequence[Tensor]]:
        return lambda: (self._read(slot),)

    def _read(self, slot: int) -> Tensor:
        offset, length, wanted = self._places[slot]
        image = torch.empty(length, dtype=torch.uint8)
        view = memoryview(image.numpy())
        try:
            done = 0
            while done < length:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as err:
            self._tree.remove(slot)
            raise self._broken(slot, err.strerror or str(err)) from err
        if done < length or zlib.crc32(view) != wanted:
            self._tree.remove(slot)
            raise self._broken(slot, "it is damaged")
        return image

    def _broken(self, slot: int, why: str) -> StorageError:
        return StorageError(f"{self.path.name}: page {slot} of the keys and values: {why}; computing from there on")


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
    counts = [geometry.page_size] * (len(tokens) // geometry.page_size)
    counts += [len(tokens) % geometry.page_size] if len(tokens) % geometry.page_size else []
    good = (
        isinstance(root, str)
        and len(root) == 2 * DIGEST
        and set(root) <= set("0123456789abcdef")
        and isinstance(pages, list)
        and all(isinstance(page, dict) and type(page.get("sum")) is int for page in pages)
        and [page.get("tokens") for page in pages] == counts
    )
    if not good:
        raise _refused(path, "damaged")
    room = os.fstat(descriptor).st_size - len(START) - FOOTER.size - len(END)
    if len(tokens) * geometry.bytes_per_token > room:
        raise _refused(path, "cut short")


def _refused(path: Path, why: str) -> StorageError:
    return StorageError(
        f"{path.name}: {why}; keys and values are computed anew", hint="/kv save writes a new one, /kv drop removes it"
    )
