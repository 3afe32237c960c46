"""The journal of a conversation: the steps since its file was written, one line each, appended as they happen.

A line is a checksum (CRC-32), a blank, JSON, a newline, and goes out in one write before the step is shown. So a
process killed at any time (kill -9 too) leaves every complete line, and at most one torn line that is not read.
What a power cut leaves depends on `sync`: see `SessionFile` for when it is called. Knows lines and steps, no sessions.
"""

import errno
import fcntl
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import steps
from .checks import Wrong
from .history import MAX_BYTES, refuse_constant
from .steps import Step

FORMAT = "exl-runtime chat journal"
VERSION = 1
SUFFIX = ".journal"


class Busy(Exception):
    """Another process writes to this journal."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Steps of a journal, in order, and whether damage (more than one torn line at the end) cut them short."""

    steps: tuple[Step, ...] = ()
    damaged: bool = False


def journal_path(path: Path) -> Path:
    """Where the journal of the conversation in `path` lies."""
    return path.with_name(path.name + SUFFIX)


def replay(data: bytes, key: str, revision: int) -> Replay:
    """The steps in `data`; none if it belongs to another conversation or to an older file of this one."""
    lines = data.split(b"\n")[:-1]  # what follows the last line end is torn, or nothing
    found: list[Step] = []
    for number, line in enumerate(lines):
        try:
            value = _decoded(line)
            if number:
                found.append(steps.from_json(value))
            elif value != _header(key, revision):
                return Replay()
        except Wrong:
            return Replay(tuple(found), damaged=True)
    return Replay(tuple(found))


class Journal:
    """An open journal, for this process alone."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises Busy, OSError."""
        self.path = path
        self._fd = _open_locked(path)
        self.size = os.fstat(self._fd).st_size

    def read(self) -> bytes:
        """All of it. Raises OSError."""
        if self.size > MAX_BYTES:
            raise OSError(errno.EFBIG, "the journal is too large")
        return os.pread(self._fd, self.size, 0)

    def restart(self, key: str, revision: int) -> None:
        """Forget all lines; the following ones belong to that file. Raises OSError."""
        os.ftruncate(self._fd, 0)
        self.size = 0
        self._write(_encoded(_header(key, revision)))
        self.sync()

    def append(self, step: Step) -> None:
        """One step. Raises OSError; the journal is then as it was before."""
        self._write(_encoded(steps.to_json(step)))

    def sync(self) -> None:
        """Wait until the disk has it. Raises OSError."""
        os.fdatasync(self._fd)

    def close(self, *, remove: bool) -> None:
        """Let go of it; `remove` when it holds nothing that the file does not."""
        try:
            if remove:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self._fd)

    def _write(self, line: bytes) -> None:
        if os.write(self._fd, line) != len(line):
            os.ftruncate(self._fd, self.size)  # half a line would spoil the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += len(line)


def _open_locked(path: Path) -> int:
    for _ in range(10):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Busy(str(path)) from None
        except OSError as err:
            if err.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                os.close(descriptor)
                raise
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its owner removed it between the two calls
    raise Busy(str(path))


def _header(key: str, revision: int) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "key": key, "revision": revision}


def _encoded(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decoded(line: bytes) -> Any:
    sum_, _, text = line.partition(b" ")
    if sum_ != b"%08x" % zlib.crc32(text):
        raise Wrong("its checksum does not fit")
    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as err:
        raise Wrong(str(err)) from err
