"""Tensor files written one tensor at a time, whole or absent. Knows no model.

Layout of a tensor file (the safetensors specification): 8 bytes little-endian length, a JSON header, the data without
holes. It is written here and not by the library because the library wants every tensor in memory at once; here a
tensor is made when its turn comes, its bytes go from its own memory to the file, and it is dropped.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, StorageError
from ..files import RETRY, write_pieces
from .header import read_header, short
from .index import FolderIndex
from .reader import DTYPES, Checkpoint

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A tensor of a file to be written: known before it exists.

    make   called once, when its bytes are due; gives the tensor, or its rows in several pieces, one after another
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor | Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of tensors that exist, on any device. Raises StorageError."""
    write_planned(path, [planned_tensor(name, tensor) for name, tensor in tensors.items()], metadata)


def planned_tensor(name: str, tensor: Tensor) -> Planned:
    """A tensor that exists already."""
    return Planned(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), make=lambda: tensor)


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
        yield from _bytes_of(entry)


def _bytes_of(entry: Planned) -> Iterator[memoryview]:
    made = entry.make()
    written = 0
    if isinstance(made, Tensor):
        if tuple(made.shape) != entry.shape:
            raise ValueError(f"{short(entry.name)}: made {tuple(made.shape)}, planned {entry.shape}")
        made = (made,)
    for piece in made:
        if piece.dtype != entry.dtype:
            raise ValueError(f"{short(entry.name)}: made {piece.dtype}, planned {entry.dtype}")
        flat = piece.detach().cpu().contiguous().reshape(-1)
        written += flat.nbytes
        yield memoryview(flat.view(torch.uint8).numpy())
    if written != entry.nbytes:
        raise ValueError(f"{short(entry.name)}: made {written} bytes, planned {entry.nbytes}")


@contextmanager
def _opened(path: Path) -> Iterator[Checkpoint]:
    try:
        infos = {info.name: info for info in read_header(path)}
        with Checkpoint(FolderIndex(folder=path.parent, files=(path,), tensors=infos)) as checkpoint:
            yield checkpoint
    except CheckpointError as err:
        raise StorageError(err.problem, hint=f"delete it, {RETRY}: it is made anew") from err
