"""Broken weight files: one clear CheckpointError each, naming the file and, where one is at fault, the tensor."""

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from exl_runtime.checkpoint import Checkpoint
from exl_runtime.errors import CheckpointError

NAME = "model.safetensors"
TENSOR = "model.layers.0.self_attn.q_proj.weight"
ENTRY = {"dtype": "F16", "shape": [2, 4], "data_offsets": [0, 16]}


def pack(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    """A file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> bytes:
    """A file with one tensor whose entry differs from a right one; a change to None removes the key."""
    changed = {**ENTRY, **changes}
    return pack({TENSOR: {key: value for key, value in changed.items() if value is not None}})


def pair(first: tuple[int, int], second: tuple[int, int], data: bytes = b"\0" * 32) -> bytes:
    """Two byte tensors at given offsets."""
    spans = {"a.weight": first, TENSOR: second}
    return pack(
        {
            name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
            for name, (begin, end) in spans.items()
        },
        data,
    )


GOOD = pack({TENSOR: ENTRY})
# kind -> (bytes, a word of the message, whether the tensor must be named)
FILES: dict[str, tuple[bytes, str, bool]] = {
    "empty file": (b"", "too short", False),
    "seven bytes": (b"\x10\0\0\0\0\0\0", "too short", False),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n", "Git LFS pointer", False),
    "web page": (b"<!DOCTYPE html><html>Entry not found</html>", "not a safetensors file", False),
    "pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00modelq\x01K\x01s.", "not a safetensors file", False),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "truncated", False),
    "GGUF": (b"GGUF\x03\0\0\0\x10\0\0\0\0\0\0\0", "not a safetensors file", False),
    "huge header length": (pack({}, length=2**64 - 1), "18446744073709551615", False),
    "NaN as header length": (b"\0\0\0\0\0\0\xf8\x7f" + b"{}", "not a safetensors file", False),
    "header length over the limit": (pack({}, length=100_000_001), "100000001", False),
    "header length beyond the file": (pack({TENSOR: ENTRY}, length=5000), "truncated", False),
    "cut inside the header": (GOOD[:40], "truncated", False),
    "header length zero": (pack(b""), "not a JSON object", False),
    "header of null bytes": (pack(b"\0" * 50), "not a JSON object", False),
    "header not UTF-8": (pack(b'{"\xff\xfe": 1}'), "not UTF-8", False),
    "header not JSON": (pack(b'{"a": '), "not valid JSON", False),
    "header ends early": (pack({TENSOR: ENTRY}, length=30), "not valid JSON", False),
    "header is a list": (pack([1, 2]), "not a JSON object", False),
    "header nested too deeply": (pack(b'{"a":' * 100_000), "nested too deeply", False),
    "header with an endless number": (pack(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON", False),
    "same tensor twice in a header": (
        pack(f'{{"{TENSOR}": {json.dumps(ENTRY)}, "{TENSOR}": {json.dumps(ENTRY)}}}'.encode()),
        "twice",
        True,
    ),
    "entry is not an object": (pack({TENSOR: [0, 16]}), "not an object", True),
    "entry without dtype": (entry(dtype=None), 'no "dtype"', True),
    "entry without shape": (entry(shape=None), 'no "shape"', True),
    "entry without offsets": (entry(data_offsets=None), 'no "data_offsets"', True),
    "unknown dtype": (entry(dtype="F12"), "F12", True),
    "dtype in lower case": (entry(dtype="float16"), "float16", True),
    "dtype is a number": (entry(dtype=16), "16", True),
    "dtype is a list": (entry(dtype=["F16"]), "dtype", True),
    "shape is a text": (entry(shape="2x4"), "2x4", True),
    "shape with a negative size": (entry(shape=[-2, -4]), "[-2, -4]", True),
    "shape with a fraction": (entry(shape=[2.0, 4]), "2.0", True),
    "shape with true": (entry(shape=[True, 8]), "True", True),
    "shape with a text": (entry(shape=["2", 4]), "'2'", True),
    "shape with null": (entry(shape=[None, 4]), "None", True),
    "shape beyond 64 bits": (entry(shape=[2**63, 1]), str(2**63), True),
    "shape that overflows 64 bits": (entry(shape=[2**40, 2**40]), str(2**81), True),
    "shape with many dimensions": (entry(shape=[2] * 100_000), "at most 8", True),
    "shape larger than its bytes": (entry(shape=[2, 5]), "takes 20 bytes", True),
    "shape smaller than its bytes": (entry(shape=[2, 3]), "takes 12 bytes", True),
    "wrong dtype": (entry(dtype="F32"), "takes 32 bytes", True),
    "scalar with a matrix's bytes": (entry(shape=[]), "takes 2 bytes", True),
    "one offset": (entry(data_offsets=[0]), "[0]", True),
    "three offsets": (entry(data_offsets=[0, 8, 16]), "[0, 8, 16]", True),
    "offsets are texts": (entry(data_offsets=["0", "16"]), "'16'", True),
    "offsets are fractions": (entry(data_offsets=[0.0, 16.0]), "16.0", True),
    "negative offsets": (entry(data_offsets=[-16, 0]), "-16", True),
    "offsets backwards": (entry(data_offsets=[16, 0]), "backwards", True),
    "offsets behind the file": (entry(data_offsets=[16, 32]), "truncated", True),
    "offsets far behind the file": (entry(data_offsets=[0, 2**62]), "truncated", True),
    "overlap": (pair((0, 20), (16, 32)), "overlap", True),
    "one inside the other": (pair((0, 32), (8, 16)), "overlap", True),
    "same bytes twice": (pair((0, 16), (0, 16), b"\0" * 16), "overlap", True),
    "hole between tensors": (pair((0, 8), (16, 32)), "belong to no tensor", True),
    "hole before the first tensor": (pair((24, 32), (8, 24)), "belong to no tensor", True),
    "data cut off": (GOOD[:-1], "truncated", True),
    "no data at all": (GOOD[:-16], "truncated", True),
    "trailing bytes": (GOOD + b"\0", "belong to no tensor", False),
    "no tensors": (pack({"__metadata__": {"format": "pt"}}, b""), "no tensors", False),
}


@pytest.mark.parametrize("kind", FILES)
def test_broken_file(kind: str, tmp_path: Path) -> None:
    data, words, names_tensor = FILES[kind]
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / NAME) in message
    assert words in message
    assert (TENSOR in message) >= names_tensor
    assert len(message) < 1000


def test_the_files_above_are_broken_in_one_way_only(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(GOOD)
    assert Checkpoint.open(tmp_path).names == {TENSOR}


def test_hostile_tensor_names_stay_short_and_printable(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(pack({"\x1b[2J\n" + "a" * 5000: 1}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- folders -----------------------------------------------------------------------------------------------------


def touch(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).write_bytes(b"x") for name in names] and None


def put(folder: Path, name: str, *tensors: str) -> None:
    save_file({tensor: torch.zeros(2, 2) for tensor in tensors}, folder / name)


def same_tensor_in_two(folder: Path) -> None:
    put(folder, "model-00001-of-00002.safetensors", "a.weight", TENSOR)
    put(folder, "model-00002-of-00002.safetensors", "b.weight", TENSOR)


def shard_copied(folder: Path) -> None:
    put(folder, "model-00001-of-00002.safetensors", TENSOR)
    put(folder, "model-00002-of-00002.safetensors", TENSOR)


def one_shard_broken(folder: Path) -> None:
    put(folder, "model-00001-of-00002.safetensors", "a.weight")
    (folder / "model-00002-of-00002.safetensors").write_bytes(GOOD[:-4])


def index_of(folder: Path, listed: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))


def shard_missing(folder: Path) -> None:
    put(folder, "model-00001-of-00002.safetensors", "a.weight")
    listed = {"a.weight": "model-00001-of-00002.safetensors", TENSOR: "model-00002-of-00002.safetensors"}
    index_of(folder, {"weight_map": listed})


def shard_missing_renamed(folder: Path) -> None:
    put(folder, "part-a.safetensors", "a.weight")
    index_of(folder, {"weight_map": {"a.weight": "part-a.safetensors", TENSOR: "part-b.safetensors"}})


def gptq_shard_missing(folder: Path) -> None:
    put(folder, "model-00001-of-00002.safetensors", "a.qweight")
    listed = {"a.qweight": "model-00001-of-00002.safetensors", "b.qweight": "model-00002-of-00002.safetensors"}
    index_of(folder, {"weight_map": listed})


def counted_shard_missing(folder: Path) -> None:
    put(folder, "model-00001-of-00003.safetensors", "a.weight")
    put(folder, "model-00003-of-00003.safetensors", "c.weight")


def exl2_shard_missing(folder: Path) -> None:
    put(folder, "output-00001-of-00002.safetensors", "a.q_weight")
    index_of(folder, {"weight_map": {}})


def garbage_index(folder: Path) -> None:
    put(folder, NAME, TENSOR)
    (folder / "model.safetensors.index.json").write_text("{")


def index_without_map(folder: Path) -> None:
    put(folder, NAME, TENSOR)
    index_of(folder, {"weight_map": {"a": 3}})


def folder_in_place_of_file(folder: Path) -> None:
    (folder / NAME).mkdir()


def pipe_in_place_of_file(folder: Path) -> None:
    os.mkfifo(folder / NAME)


def broken_link(folder: Path) -> None:
    (folder / NAME).symlink_to(folder / "gone")


FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "nothing": (touch(), ("no weights",)),
    "only tokenizer": (touch("tokenizer.json"), ("no weights",)),
    "only .bin": (touch("pytorch_model.bin"), ("pytorch_model.bin", "pickles", "safetensors")),
    "only .pt": (touch("model.pt"), ("model.pt", "pickles")),
    "only .pth": (touch("consolidated.00.pth"), ("consolidated.00.pth", "pickles")),
    "only .ckpt": (touch("model.ckpt"), ("model.ckpt", "pickles")),
    "only .gguf": (touch("model.Q4_K_M.gguf"), ("model.Q4_K_M.gguf", "GGUF")),
    "only an adapter": (touch("adapter_model.safetensors"), ("adapter",)),
    "only leftovers of a download": (touch("._model.safetensors", ".model.safetensors"), ("no weights",)),
    "tensor in two files": (same_tensor_in_two, (TENSOR, "00001-of", "00002-of", "two files")),
    "one shard twice": (shard_copied, (TENSOR, "two files")),
    "one of two files broken": (one_shard_broken, (TENSOR, "model-00002-of-00002.safetensors")),
    "shard of the index missing": (shard_missing, (TENSOR, "model-00002-of-00002.safetensors", "missing")),
    "renamed shard missing": (shard_missing_renamed, (TENSOR, "part-b.safetensors", "missing")),
    "GPTQ shard missing": (gptq_shard_missing, ("b.qweight", "model-00002-of-00002.safetensors", "missing")),
    "counted shard missing": (counted_shard_missing, ("model-00002-of-00003.safetensors", "2 of 3")),
    "EXL2 shard missing": (exl2_shard_missing, ("output-00002-of-00002.safetensors", "1 of 2")),
    "garbage index": (garbage_index, ("model.safetensors.index.json", "JSON")),
    "index without a map": (index_without_map, ("model.safetensors.index.json", "weight_map")),
    "folder in place of the file": (folder_in_place_of_file, (NAME, "a folder")),
    "pipe in place of the file": (pipe_in_place_of_file, (NAME, "not a regular file")),
    "broken link": (broken_link, (NAME, "link")),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_broken_folder(kind: str, tmp_path: Path) -> None:
    make, words = FOLDERS[kind]
    make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    for word in words:
        assert word in message
    assert len(message) < 1000


def test_folder_missing_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / NAME).write_bytes(GOOD)
    with pytest.raises(CheckpointError, match="a file, not a folder"):
        Checkpoint.open(tmp_path / NAME)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).write_bytes(GOOD)
    real = builtins.open

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith(".safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: Permission denied"):
        Checkpoint.open(tmp_path)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        Checkpoint.open(tmp_path)


# --- any damage --------------------------------------------------------------------------------------------------

VALID = save({"a.weight": torch.arange(12, dtype=torch.float32), "b.bias": torch.ones(3, dtype=torch.bool)})
Flips = list[tuple[int, int]]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(VALID)),
    st.binary(max_size=4),
)
def test_any_damage_is_an_error_or_loads(tmp_path: Path, flips: Flips, cut: int, more: bytes) -> None:
    data = bytearray(VALID)
    for position, value in flips:
        data[position] = value
    data = (data if cut % 3 else data[:cut]) + more
    (tmp_path / NAME).write_bytes(data)
    try:
        with Checkpoint.open(tmp_path) as checkpoint:
            assert sum(checkpoint.tensor(name).nbytes for name in checkpoint.names) <= len(data)
    except CheckpointError as err:
        assert NAME in str(err)


HEADERS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 20), st.sampled_from(["F16", "U8", "BOOL", "x"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "__metadata__", "dtype", "shape", "data_offsets"]), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HEADERS, st.integers(0, 20))
def test_any_header_is_an_error_or_loads(tmp_path: Path, header: Any, size: int) -> None:
    (tmp_path / NAME).write_bytes(pack(header, b"\1" * size))
    try:
        with Checkpoint.open(tmp_path) as checkpoint:
            assert all(checkpoint.tensor(name).nbytes <= size for name in checkpoint.names)
    except CheckpointError as err:
        assert NAME in str(err)
