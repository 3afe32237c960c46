"""Files that are whole or absent: written beside their place, flushed to the disk, renamed. Knows no model."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .config.read import read_object
from .errors import ConfigError, StorageError

PARTIAL = ".partial"
GIB = 2**30
RETRY = "then run the same command again"
_REFUSALS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", f"free some space on it, {RETRY}"),
    errno.EDQUOT: ("your disk quota is used up", f"free some space, {RETRY}"),
    errno.EFBIG: ("larger than the file system or `ulimit -f` allows", "write smaller shards, or to another disk"),
    errno.EROFS: ("the disk is read-only", "choose a folder on another disk"),
    errno.EACCES: ("no permission to write here", "choose another folder, or change the permissions of this one"),
    errno.EPERM: ("no permission to write here", "choose another folder, or change the permissions of this one"),
    errno.ENOENT: ("its folder is gone", f"was it moved or deleted, or a drive unplugged? Bring it back, {RETRY}"),
    errno.ENOTDIR: ("its folder is gone: a file has its name", f"move that file away, {RETRY}"),
    errno.ESTALE: ("its folder is gone", f"reconnect the network drive, {RETRY}"),
    errno.EEXIST: ("a file of this name is in the way", f"move it away, {RETRY}"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
}


def cache_home() -> Path:
    """The user's folder for what can be made or fetched again, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base) if os.path.isabs(base) else Path.home() / ".cache"


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """The pieces one after another as the new content of `path`; each is dropped before the next is asked for.

    Whatever happens, `path` holds its old content or all of the new. Raises StorageError when the system refuses;
    errors of the pieces themselves pass through.
    """
    partial = path.with_name(path.name + PARTIAL)
    descriptor = -1
    try:
        with naming(path):
            partial.unlink(missing_ok=True)
            # O_EXCL: never through a link that somebody left under this name.
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        for piece in pieces:
            with naming(path):
                _write_all(descriptor, memoryview(piece))
            del piece  # or it would live while the next one is made
        with naming(path):
            os.fsync(descriptor)
            closing, descriptor = descriptor, -1
            os.close(closing)
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            if descriptor >= 0:
                os.close(descriptor)
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    with naming(path):
        sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """See `write_pieces`."""
    write_pieces(path, (data,))


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """A JSON object, indented. Raises StorageError; ValueError or TypeError for what JSON cannot say (NaN, objects)."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii"))


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file that `write_json` wrote. Raises StorageError: missing, damaged, unreadable."""
    try:
        value = read_object(path)
    except ConfigError as err:
        raise StorageError(err.problem, hint=f"delete it, {RETRY}: it is made anew") from err
    if value is None:
        raise StorageError(f"{path}: no such file", hint="was it moved or deleted?")
    return value


def remove_partials(folder: Path) -> None:
    """Delete what a killed process left half-written directly in `folder`. Raises StorageError."""
    with naming(folder):
        for path in folder.iterdir():
            if path.name.endswith(PARTIAL) and (path.is_symlink() or path.is_file()):
                path.unlink(missing_ok=True)


def require_space(folder: Path, needed: int, what: str) -> None:
    """StorageError unless the disk of `folder` (which need not exist yet) has `needed` bytes free for `what`."""
    with naming(folder):
        place = folder.absolute()
        existing = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{folder}: {what} needs {needed / GIB:.2f} GiB, the disk has {free / GIB:.2f} GiB free",
            hint=f"free {(needed - free) / GIB:.2f} GiB, or choose a folder on another disk",
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError inside into one StorageError that names `path`, the reason and the way out."""
    try:
        yield
    except OSError as err:
        default = (err.strerror or str(err), f"check the disk, {RETRY}")
        why, hint = _REFUSALS.get(err.errno or 0, default)
        raise StorageError(f"{path}: cannot be written: {why}", hint=hint) from err


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as err:
        # Some network and user-space file systems have no such operation for folders; the file itself is safe.
        if err.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])
