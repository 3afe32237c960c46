"""One file of named buffers that is read back into memory as one block, fast, and only if every bit of it is right.

    MAGIC, 64 bytes with zeros | data | index, JSON | trailer

The data are the buffers in order, each at a multiple of ALIGN. The index has the key of the file, the places of the
buffers, and a checksum for every BLOCK bytes of the data; the trailer has the index's own length and hash, and MAGIC
again. So a file that was cut, or that another program wrote, is known from its end, and damage from the checksums,
which are taken while the bytes of a block are still in the processor's cache: a second look costs next to nothing.

Blocks are read by several threads into memory on huge pages. Mapping the file would save the copy, but gives pages of
4 KiB, and a token walks over all of them.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_pieces
from ..memory import ALIGN, empty_bytes
from .threads import in_pieces

Checksum = Callable[[Tensor], int]  # of a contiguous uint8 tensor, 64 bits

MAGIC = b"exl packed model, layout of file 1".ljust(64, b"\0")
BLOCK = 4 << 20
TRAILER = struct.Struct("<Q32s64s")
MOST_INDEX = 1 << 28  # bytes


class Unusable(Exception):
    """Why a file cannot be used. Its owner makes a new one."""


def write(path: Path, key: str, buffers: Mapping[str, Tensor], checksum: Checksum) -> None:
    """Write `buffers` (uint8, one dimension) as `path`, which then is whole or absent. Raises StorageError."""
    write_pieces(path, _pieces(key, buffers, checksum))


def file_bytes(buffers: Mapping[str, Tensor]) -> int:
    """About the size of the file for these buffers."""
    return sum(buffer.nbytes + ALIGN + 64 for buffer in buffers.values()) + 2 * len(MAGIC)


def _pieces(key: str, buffers: Mapping[str, Tensor], checksum: Checksum) -> Iterator[bytes | memoryview]:
    yield MAGIC
    block = torch.empty(BLOCK, dtype=torch.uint8)
    filled, total = 0, 0
    places: list[tuple[str, int, int]] = []
    sums: list[int] = []

    def full() -> memoryview:
        sums.append(checksum(block[:filled]))
        return memoryview(block[:filled].numpy())

    for name, buffer in buffers.items():
        places.append((name, total, buffer.numel()))
        size = -(-buffer.numel() // ALIGN) * ALIGN
        total += size
        done = 0
        while done < size:
            count = min(BLOCK - filled, size - done)
            room, part = block[filled : filled + count], buffer[done : done + count]
            room[: part.numel()].copy_(part)
            room[part.numel() :].zero_()
            filled, done = filled + count, done + count
            if filled == BLOCK:
                yield full()
                filled = 0
    if filled:
        yield full()
    index = json.dumps({"key": key, "bytes": total, "block": BLOCK, "sums": sums, "buffers": places}).encode()
    yield index
    yield TRAILER.pack(len(index), _hash(index), MAGIC)


def read(path: Path, key: str, checksum: Checksum) -> dict[str, Tensor]:
    """The buffers of a file that `write` made with this key, as views of one block of memory.

    Raises Unusable saying why not: absent, unreadable, of another key, cut, damaged.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise Unusable(err.strerror or str(err)) from err
    try:
        total, sums, places = _index(descriptor, key)
        block = empty_bytes(total)
        _read_blocks(descriptor, block, sums, checksum)
    except OSError as err:
        raise Unusable(err.strerror or str(err)) from err
    except (RuntimeError, MemoryError) as err:
        raise Unusable(f"no memory for its {total} bytes") from err
    finally:
        os.close(descriptor)
    return {name: block[at : at + size] for name, at, size in places}


def _index(descriptor: int, key: str) -> tuple[int, list[int], list[tuple[str, int, int]]]:
    """(bytes of data, checksums, places), all checked against each other and the size of the file."""
    size = os.fstat(descriptor).st_size
    trailer = os.pread(descriptor, TRAILER.size, max(0, size - TRAILER.size))
    if len(trailer) < TRAILER.size or not trailer.endswith(MAGIC) or os.pread(descriptor, len(MAGIC), 0) != MAGIC:
        raise Unusable("it is cut short, or not a packed model")
    length, digest, _ = TRAILER.unpack(trailer)
    start = size - TRAILER.size - length
    if length > MOST_INDEX or start < len(MAGIC):
        raise Unusable("its index does not fit")
    text = os.pread(descriptor, length, start)
    if _hash(text) != digest:
        raise Unusable("its index is damaged")
    index = json.loads(text)
    if index["key"] != key:
        raise Unusable("it is of another model, or of another version of it")
    total, sums = index["bytes"], index["sums"]
    if index["block"] != BLOCK or len(MAGIC) + total != start or len(sums) != -(-total // BLOCK):
        raise Unusable("its parts do not fit together")
    return total, sums, [(name, at, count) for name, at, count in index["buffers"]]


def _read_blocks(descriptor: int, block: Tensor, sums: list[int], checksum: Checksum) -> None:
    target = memoryview(block.numpy())

    def one(begin: int, end: int) -> bool:
        done = begin
        while done < end:
            count = os.preadv(descriptor, [target[done:end]], len(MAGIC) + done)
            if count == 0:
                return False
            done += count
        return checksum(block[begin:end]) == sums[begin // BLOCK]

    if not in_pieces(len(target), BLOCK, one):
        raise Unusable("it is damaged")


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
