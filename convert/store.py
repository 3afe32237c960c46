"""Files that are whole or absent: written beside their place, flushed to the disk, renamed. Knows no model.

Layout of a tensor file (the safetensors specification): 8 bytes little-endian length, a JSON header, the data without
holes. It is written here and not by the library because the library wants every tensor in memory at once; here a
tensor is made when its turn comes, its bytes go from its own memory to the file, and it is dropped.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl_runtime.checkpoint import Checkpoint
from exl_runtime.checkpoint.header import read_header, short
from exl_runtime.checkpoint.index import FolderIndex
from exl_runtime.checkpoint.reader import DTYPES
from exl_runtime.config.read import read_object
from exl_runtime.errors import CheckpointError, ConfigError, ConvertError

PARTIAL = ".partial"
GIB = 2**30
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RETRY = "then run the same command again"
_REFUSALS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", f"free some space on it, {_RETRY}"),
    errno.EDQUOT: ("your disk quota is used up", f"free some space, {_RETRY}"),
    errno.EFBIG: ("larger than the file system or `ulimit -f` allows", "write smaller shards, or to another disk"),
    errno.EROFS: ("the disk is read-only", "choose a folder on another disk"),
    errno.EACCES: ("no permission to write here", "choose another folder, or change the permissions of this one"),
    errno.EPERM: ("no permission to write here", "choose another folder, or change the permissions of this one"),
    errno.ENOENT: ("its folder is gone", f"was it moved or deleted, or a drive unplugged? Bring it back, {_RETRY}"),
    errno.ENOTDIR: ("its folder is gone: a file has its name", f"move that file away, {_RETRY}"),
    errno.ESTALE: ("its folder is gone", f"reconnect the network drive, {_RETRY}"),
    errno.EEXIST: ("a file of this name is in the way", f"move it away, {_RETRY}"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A tensor of a file to be written: known before it exists. `make` is called once, when its bytes are due."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """The pieces one after another as the new content of `path`; each is dropped before the next is asked for.

    Whatever happens, `path` holds its old content or all of the new. Raises ConvertError when the system refuses;
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
    """A JSON object, indented. Raises ConvertError; ValueError or TypeError for what JSON cannot say (NaN, objects)."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of tensors that exist, on any device. Raises ConvertError."""
    planned = [
        Planned(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), make=lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    write_planned(path, planned, metadata)


def write_planned(path: Path, planned: Sequence[Planned], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of tensors made one at a time, in the order given, but for those that would misalign others.

    Raises ConvertError when the system refuses; ValueError when a tensor is not what its plan says.
    """
    ordered = _aligned(planned)
    write_pieces(path, _container(ordered, metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, on the CPU. Raises ConvertError naming the file."""
    with _opened(path) as checkpoint:
        return {name: checkpoint.tensor(name) for name in sorted(checkpoint.names)}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file; the others are not read. Raises ConvertError naming the file."""
    with _opened(path) as checkpoint:
        return checkpoint.tensor(name)


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file that `write_json` wrote. Raises ConvertError: missing, damaged, unreadable."""
    try:
        value = read_object(path)
    except ConfigError as err:
        raise ConvertError(err.problem, hint=f"delete it, {_RETRY}: it is made anew") from err
    if value is None:
        raise ConvertError(f"{path}: no such file", hint="was it moved or deleted?")
    return value


def remove_partials(folder: Path) -> None:
    """Delete what a killed process left half-written directly in `folder`. Raises ConvertError."""
    with naming(folder):
        for path in folder.iterdir():
            if path.name.endswith(PARTIAL) and (path.is_symlink() or path.is_file()):
                path.unlink(missing_ok=True)


def require_space(folder: Path, needed: int, what: str) -> None:
    """ConvertError unless the disk of `folder` (which need not exist yet) has `needed` bytes free for `what`."""
    with naming(folder):
        place = folder.absolute()
        existing = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConvertError(
            f"{folder}: {what} needs {needed / GIB:.2f} GiB, the disk has {free / GIB:.2f} GiB free",
            hint=f"free {(needed - free) / GIB:.2f} GiB, or choose a folder on another disk",
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError inside into one ConvertError that names `path`, the reason and the way out."""
    try:
        yield
    except OSError as err:
        default = (err.strerror or str(err), f"check the disk, {_RETRY}")
        why, hint = _REFUSALS.get(err.errno or 0, default)
        raise ConvertError(f"{path}: cannot be written: {why}", hint=hint) from err


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


def _aligned(planned: Sequence[Planned]) -> list[Planned]:
    """The same tensors, those last whose size would leave the next one at an odd address, larger items first.

    Readers that map a file cannot view, say, int32 at an address that 4 does not divide.
    """
    widest = max((entry.dtype.itemsize for entry in planned), default=1)

    def place(entry: Planned) -> tuple[bool, int]:
        misaligns = entry.nbytes % widest != 0
        return misaligns, -entry.dtype.itemsize if misaligns else 0

    return sorted(planned, key=place)


def _container(ordered: Sequence[Planned], metadata: Mapping[str, str] | None) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for entry in ordered:
        if entry.name in header or entry.name == "__metadata__":
            raise ValueError(f"{entry.name}: two tensors of this name in one file")
        stop = start + entry.nbytes
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry in ordered:
        yield _bytes_of(entry)


def _bytes_of(entry: Planned) -> memoryview:
    tensor = entry.make()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        made, wanted = f"{tensor.dtype} {tuple(tensor.shape)}", f"{entry.dtype} {entry.shape}"
        raise ValueError(f"{short(entry.name)}: made {made}, planned {wanted}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


@contextmanager
def _opened(path: Path) -> Iterator[Checkpoint]:
    try:
        infos = {info.name: info for info in read_header(path)}
        with Checkpoint(FolderIndex(folder=path.parent, files=(path,), tensors=infos)) as checkpoint:
            yield checkpoint
    except CheckpointError as err:
        raise ConvertError(err.problem, hint=f"delete it, {_RETRY}: it is made anew") from err
