"""Read tensors out of a checked safetensors folder, one at a time. Does not know what they mean.

Bytes go from the file straight into the tensor that is returned: no mapping that a shrinking file could turn into a
crash, and never a second copy in memory. Reads carry their own position, so threads may share a `Checkpoint`.
"""

import difflib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import CheckpointError, OutOfMemory
from ..memory import empty_bytes
from .groups import TensorGroup
from .header import AGAIN, TensorInfo, short
from .index import FolderIndex, read_folder
from .threads import in_pieces

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
PIECE = 4 << 20  # bytes that a thread reads at a time, of tensors that have several such pieces
_MANY = 2000  # similar names are looked for among at most this many


class Checkpoint:
    """The tensors of a model folder. Use as a context manager, or call `close`; tensors outlive it."""

    def __init__(self, index: FolderIndex) -> None:
        self.folder = index.folder
        self.files = index.files
        self.names = frozenset(index.tensors)
        self.total_bytes = sum(info.nbytes for info in index.tensors.values())
        self._tensors = index.tensors
        self._groups: dict[str, list[str]] = {}
        for name in index.tensors:
            path, dot, suffix = name.rpartition(".")
            if dot:
                self._groups.setdefault(path, []).append(suffix)
        self._sizes = {path: path.stat().st_size for path in index.files}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Check the headers of every file in `folder`; read no tensor yet. Raises CheckpointError."""
        return cls(read_folder(Path(folder)))

    def has(self, name: str) -> bool:
        """True when a tensor of this name exists."""
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """What the header says about a tensor. Raises CheckpointError when there is none of this name."""
        if name not in self._tensors:
            raise self._missing(f"tensor {short(name)}", name, self._tensors)
        return self._tensors[name]

    def where(self, name: str) -> str:
        """A tensor and its file, for messages: "model.norm.weight in model.safetensors"."""
        return f"{short(name)} in {self.info(name).file.name}"

    def suffixes(self, path: str) -> frozenset[str]:
        """The last parts of the names `path`.<suffix>; empty when there are none."""
        return frozenset(self._groups.get(path, ()))

    def group(self, path: str) -> TensorGroup:
        """All tensors named `path`.<suffix>. Raises CheckpointError when there is none."""
        if path not in self._groups:
            raise self._missing(f"matrix {short(path)}", path, self._groups)
        return TensorGroup(path, {suffix: self.info(f"{path}.{suffix}") for suffix in self._groups[path]}, self.tensor)

    def tensor(
        self,
        name: str,
        *,
        row: int | None = None,
        part: tuple[int, int] | None = None,
        room: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """A contiguous CPU tensor of the stored dtype and shape.

        row   read only the slice [row] of the first dimension (one expert of a stacked tensor)
        part  read only [start:stop) of the first dimension, of what `row` leaves
        room  bytes -> the uint8 buffer the tensor shall lie in; None: the tensor is new and the caller's own
        Raises CheckpointError (no such tensor, row or part, file changed or unreadable), OutOfMemory.
        """
        info = self.info(name)
        shape, start, nbytes = info.shape, info.start, info.nbytes
        if row is not None:
            if not shape or not 0 <= row < shape[0]:
                raise CheckpointError(f"{self.where(name)}: shape {shape} has no row {row}")
            nbytes //= shape[0]
            shape, start = shape[1:], start + row * nbytes
        if part is not None:
            if not shape or not 0 <= part[0] <= part[1] <= shape[0]:
                raise CheckpointError(f"{self.where(name)}: shape {shape} has no part {part[0]} to {part[1]}")
            one = nbytes // max(1, shape[0])
            shape, start, nbytes = (part[1] - part[0], *shape[1:]), start + part[0] * one, (part[1] - part[0]) * one
        try:
            raw = empty_bytes(nbytes) if room is None else room(nbytes)
        except (RuntimeError, MemoryError) as err:
            raise OutOfMemory(f"{self.where(name)}: no memory for its {nbytes} bytes") from err
        if nbytes:
            self._read_into(info, start, memoryview(raw.numpy()))
        if info.dtype == "BOOL":
            return (raw != 0).reshape(shape)  # any other byte would be an invalid bool
        return raw.view(DTYPES[info.dtype]).reshape(shape)

    def close(self) -> None:
        """Close the files. Tensors already read stay valid."""
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptors", None):
            self.close()

    def _read_into(self, info: TensorInfo, start: int, target: memoryview) -> None:
        try:
            descriptor = self._descriptor(info.file)

            def one(done: int, end: int) -> bool:
                while done < end:
                    count = os.preadv(descriptor, [target[done:end]], start + done)
                    if count == 0:
                        raise CheckpointError(f"{info.file}: ends inside tensor {short(info.name)}", hint=AGAIN)
                    done += count
                return True

            in_pieces(len(target), PIECE, one)
        except OSError as err:
            raise CheckpointError(
                f"{info.file}: tensor {short(info.name)} cannot be read: {err.strerror or err}",
                hint="check the disk and the permissions of the file",
            ) from err

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{self.folder}: the checkpoint is closed")
            if path not in self._descriptors:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if os.fstat(descriptor).st_size != self._sizes[path]:
                    os.close(descriptor)
                    raise CheckpointError(f"{path}: the file changed while the model was loading", hint="load it again")
                self._descriptors[path] = descriptor
            return self._descriptors[path]

    def _missing(self, what: str, name: str, known: dict[str, object]) -> CheckpointError:
        close = difflib.get_close_matches(name, _candidates(name, known), n=3, cutoff=0.5)
        nearest = f"; nearest names: {', '.join(short(other) for other in close)}" if close else ""
        files = f"{self.files[0].name} ... {self.files[-1].name}" if len(self.files) > 1 else self.files[0].name
        return CheckpointError(
            f"{self.folder}: {what} is in no file ({files}){nearest}",
            hint="the download is incomplete, or config.json belongs to another model",
        )


def _candidates(name: str, known: dict[str, object]) -> list[str]:
    """A bounded choice of names that may be meant: comparing with all of them would take minutes in large models."""
    alike = [[other for other in known if part in other] for part in name.split(".")[-2:]]
    return min(filter(None, alike), key=len, default=list(known))[:_MANY]
