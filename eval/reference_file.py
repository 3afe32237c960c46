"""The file that keeps log-probabilities: whole or absent, checked to the last byte, read one window at a time.

    magic 8 bytes | length of the header, uint64 | header, JSON
    per window    top int32 (n,) | nll float64 (n,) | codes uint16 (n, vocab)
    at the end    CRC-32 of every window, uint32 (windows,)

Little-endian. The header follows from the `Layout` alone: a file that is not what is wanted differs in it or in size.
"""

import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from exl_runtime.errors import StorageError
from exl_runtime.files import PARTIAL, naming, write_pieces

from .logprobs import Rows

MAGIC = b"exlref1\n"
SUFFIX = ".logprobs"
_STALE = 86400.0  # seconds after which a half-written file belongs to nobody; who writes touches it at every window
_PIECE = 2**24
_OURS = re.compile(rf"[0-9a-f]{{32}}(-\d+)?({re.escape(SUFFIX)}|\.[a-z0-9-]+\.json)({re.escape(PARTIAL)})?")


@dataclass(frozen=True)
class Layout:
    """What a file holds. key: see `reference.py`; counts: scored tokens of every window."""

    key: str
    vocab: int
    counts: tuple[int, ...]

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the file."""
        text = json.dumps({"key": self.key, "vocab": self.vocab, "counts": self.counts}).encode("ascii")
        return MAGIC + len(text).to_bytes(8, "little") + text

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each window begins in the file, and behind the last one the end of all."""
        return tuple(accumulate((self.window_bytes(n) for n in self.counts), initial=len(self.header)))

    def window_bytes(self, n: int) -> int:
        """Of a window with n scored tokens."""
        return n * (4 + 8 + 2 * self.vocab)

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self.starts[-1] + 4 * len(self.counts)


def write(path: Path, layout: Layout, windows: Iterable[Rows]) -> None:
    """Write the rows of all windows as they come; one window is in memory at a time. Raises StorageError.

    Several processes may write the same file at once: each writes its own, the last to finish stays.
    """
    with naming(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
    own = path.with_name(f"{path.stem}-{os.getpid()}{SUFFIX}")
    write_pieces(own, _pieces(layout, windows))
    with naming(path):
        os.replace(own, path)


def flaw(path: Path, layout: Layout) -> str | None:
    """What is wrong with the file, in a few words; None: it is what `layout` says. Reads all of it.

    Raises FileNotFoundError.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(layout.header)) != layout.header:
                return "not a file of reference log-probabilities for this model and text"
            if size != layout.nbytes:
                return f"damaged: {size} bytes instead of {layout.nbytes}"
            sums = [_checksum(file.read, layout.window_bytes(n)) for n in layout.counts]
            if file.read() != _footer(sums):
                return "damaged: a checksum does not match"
    except FileNotFoundError:
        raise
    except OSError as err:
        return f"cannot be read: {err.strerror or err}"
    return None


class ReferenceFile:
    """An open file that `flaw` found nothing wrong with. Safe to use from several threads."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Raises StorageError."""
        self._path, self._layout = path, layout
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as err:
            raise self._gone(err.strerror or str(err)) from err

    def rows(self, index: int) -> Rows:
        """The window `index`. Raises StorageError when the file cannot be read any more."""
        layout = self._layout
        n, at = layout.counts[index], layout.starts[index]
        rows = Rows.empty(n, layout.vocab)
        for part in (rows.top, rows.nll, rows.codes):
            view = memoryview(part).cast("B")
            done = 0
            while done < len(view):
                try:
                    got = os.preadv(self._file.fileno(), [view[done : done + _PIECE]], at + done)
                except OSError as err:
                    raise self._gone(err.strerror or str(err)) from err
                if not got:
                    raise self._gone("it became shorter")
                done += got
            at += done
        return rows

    def close(self) -> None:
        """Any further use raises ValueError."""
        self._file.close()

    def _gone(self, why: str) -> StorageError:
        return StorageError(
            f"{self._path}: cannot be read: {why}", hint="run the same command again: it is made anew if need be"
        )


def clear(folder: Path) -> tuple[int, int]:
    """Delete all of ours in `folder`, finished or not: (files, bytes). Raises StorageError."""
    files = kept(folder)
    size = 0
    for path in files:
        with naming(path), suppress(FileNotFoundError):
            size += path.lstat().st_size
            path.unlink()
    return len(files), size


def kept(folder: Path) -> list[Path]:
    """Our files in `folder`, which need not exist. Raises StorageError."""
    with naming(folder):
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if _OURS.fullmatch(path.name) and path.is_file())


def _pieces(layout: Layout, windows: Iterable[Rows]) -> Iterator[bytes | memoryview]:
    yield layout.header
    sums = []
    for n, rows in zip(layout.counts, windows, strict=True):
        if rows.codes.shape != (n, layout.vocab):
            raise ValueError(f"rows of shape {rows.codes.shape} for a window of {n} tokens")
        total = 0
        for part in (rows.top, rows.nll, rows.codes):
            view = memoryview(part).cast("B")
            total = zlib.crc32(view, total)
            yield view
        sums.append(total)
        del rows, part, view  # or they would live while the next ones are made
    yield _footer(sums)


def _checksum(read: Callable[[int], bytes], nbytes: int) -> int:
    total = 0
    while nbytes:
        piece = read(min(nbytes, _PIECE))
        if not piece:
            break
        total = zlib.crc32(piece, total)
        nbytes -= len(piece)
    return total


def _footer(sums: list[int]) -> bytes:
    return np.array(sums, "<u4").tobytes()


def _remove_stale(folder: Path) -> None:
    """Half-written files of processes that were killed. Raises OSError."""
    for path in folder.iterdir():
        match = _OURS.fullmatch(path.name)
        if match and (match[1] or match[3]):
            with suppress(FileNotFoundError):  # its owner was faster
                if time.time() - path.lstat().st_mtime > _STALE:
                    path.unlink()
