"""Tensor files written one tensor at a time, whole or absent. Knows no model.

Layout of a tensor file (the safetensors specification): 8 bytes little-endian length, a JSON header, the data without
holes. It is written here and not by the library because the library wants every tensor in memory at once; here a
tensor is made when its turn comes, its bytes go from its own memory to the file, and it is dropped.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl_runtime.checkpoint import Checkpoint
from exl_runtime.checkpoint.header import read_header, short
from exl_runtime.checkpoint.index import FolderIndex
from exl_runtime.checkpoint.reader import DTYPES
from exl_runtime.errors import CheckpointError, StorageError
from exl_runtime.files import RETRY, write_pieces

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of tensors that exist, on any device. Raises StorageError."""
    planned = [
        Planned(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), make=lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    write_planned(path, planned, metadata)


def write_planned(path: Path, planned: Sequence[Planned], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of tensors made one at a time, in the order given, but for those that would misalign others.

    Raises StorageError when the system refuses; ValueError when a tensor is not what its plan says.
    """
    ordered = _aligned(planned)
    write_pieces(path, _container(ordered, metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, on the CPU. Raises StorageError naming the file."""
    with _opened(path) as checkpoint:
        return {name: checkpoint.tensor(name) for name in sorted(checkpoint.names)}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file; the others are not read. Raises StorageError naming the file."""
    with _opened(path) as checkpoint:
        return checkpoint.tensor(name)


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
        raise StorageError(err.problem, hint=f"delete it, {RETRY}: it is made anew") from err
