"""Parse and check the header of one safetensors file. Reads no tensor data and trusts nothing the header says.

Layout (the safetensors specification): 8 bytes little-endian length n, n bytes of JSON, then the data. The JSON maps
a tensor name to {"dtype", "shape", "data_offsets": [begin, end)}, offsets counted from the start of the data; an
optional "__metadata__" entry maps text to text. Tensors fill the data without holes and without overlap.
"""

import json
import math
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_DIMS = 8
ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
AGAIN = "the file is damaged or only partly downloaded; download it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor.

    dtype        safetensors spelling: "F16", "BF16", "I32", ...
    start, stop  its bytes [start, stop) counted from the beginning of `file`
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes the tensor occupies in the file."""
        return self.stop - self.start


def read_header(path: Path) -> tuple[TensorInfo, ...]:
    """Every tensor of one file, in the order of its bytes. Raises CheckpointError naming the file and the tensor."""
    try:
        mode = path.stat().st_mode
        # A pipe or device would block or never end.
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise CheckpointError(f"{path}: {kind}, wanted a safetensors file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            text = _header_bytes(path, file, size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: a link to a file that does not exist", hint="download the file again") from None
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err.strerror or err}", hint="check its permissions") from err
    tensors = [
        _tensor(path, name, entry, data_start=8 + len(text), size=size)
        for name, entry in _entries(path, text).items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda info: (info.start, info.stop))
    _require_gapless(path, tensors, 8 + len(text), size)
    return tuple(tensors)


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    start = file.read(8)
    if start.startswith(b"version "):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the weights themselves", hint="run `git lfs pull` in the folder"
        )
    if len(start) < 8:
        raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file", hint=AGAIN)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: not a safetensors file: it announces a header of {length} bytes (limit {MAX_HEADER})",
            hint=AGAIN,
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path}: truncated: it announces a header of {length} bytes, but the file has {size} bytes", hint=AGAIN
        )
    text = file.read(length)
    if len(text) != length:
        raise CheckpointError(f"{path}: the file became shorter while it was read", hint=AGAIN)
    return text


def _entries(path: Path, text: bytes) -> dict[str, object]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: not a safetensors file: the header is not a JSON object", hint=AGAIN)
    twice: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice.extend(name for name, count in Counter(key for key, _ in pairs).items() if count > 1)
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as err:
        raise CheckpointError(f"{path}: the header is not UTF-8 text (byte {8 + err.start})", hint=AGAIN) from err
    except RecursionError as err:
        raise CheckpointError(f"{path}: the header is nested too deeply", hint=AGAIN) from err
    except ValueError as err:  # JSONDecodeError, or a number with thousands of digits
        raise CheckpointError(f"{path}: the header is not valid JSON: {err}", hint=AGAIN) from err
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object", hint=AGAIN)
    if twice:
        raise CheckpointError(f"{path}: {short(twice[0])} appears twice in the header", hint=AGAIN)
    return header


def _tensor(path: Path, name: str, entry: object, *, data_start: int, size: int) -> TensorInfo:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {short(name)}: {what}", hint=AGAIN)

    if not isinstance(entry, dict):
        raise bad("its header entry is not an object")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise bad(f'its header entry has no "{key}"')
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise bad(f"dtype {short(dtype)} is not known (known: {', '.join(ITEM_BYTES)})")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(dim) for dim in shape):
        raise bad(f"shape {short(shape)} is not a list of at most {MAX_DIMS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise bad(f"data_offsets {short(offsets)} are not two offsets")
    begin, end = offsets
    if begin > end:
        raise bad(f"data_offsets {begin} to {end} run backwards")
    if data_start + end > size:
        raise bad(f"its bytes end at {data_start + end}, but the file ends at {size}: truncated")
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if wanted != end - begin:
        raise bad(f"{dtype} {shape} takes {wanted} bytes, its data_offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


def _require_gapless(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    end, last = data_start, None
    for info in tensors:
        if info.start < end:
            raise CheckpointError(
                f"{path}: tensors {short(last.name if last else '')} and {short(info.name)} overlap", hint=AGAIN
            )
        if info.start > end:
            raise CheckpointError(
                f"{path}: bytes {end} to {info.start} before tensor {short(info.name)} belong to no tensor", hint=AGAIN
            )
        end, last = info.stop, info
    if end != size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {end}, the file at {size}: {size - end} bytes belong to no tensor",
            hint=AGAIN,
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def short(value: object) -> str:
    """Something from a header as it may appear in a message: names as they are, everything cut to a sane length."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
