"""Files that are whole or absent: every way in which a system refuses to write, and the library as reader."""

import errno
import json
import os
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exl_runtime import files
from exl_runtime.checkpoint import writer
from exl_runtime.checkpoint.writer import Planned
from exl_runtime.errors import StorageError

OLD = b"what was here before"


def planned(name: str, tensor: torch.Tensor) -> Planned:
    return Planned(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), make=lambda: tensor)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process may grow beyond the limit, as on a file system with one: a real EFBIG."""
    limit = 64 * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what is written ---------------------------------------------------------------------------------------------


def test_bytes_and_json_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_bytes(OLD)
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    value = {"layers": [1, 2.5, None, True], "name": 'ü\n" \ud800', "more": {}}
    files.write_json(path, value)
    assert json.loads(path.read_text()) == value == files.read_json(path)
    assert names(tmp_path) == ["job.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_bytes(OLD)
    with pytest.raises(ValueError):
        files.write_json(path, {"error": float("nan")})
    assert path.read_bytes() == OLD


TENSORS = {
    "half": torch.randn(3, 5).half(),
    "int8": torch.randint(-128, 128, (7,), dtype=torch.int8),
    "bytes": torch.randint(0, 256, (5, 3), dtype=torch.uint8),
    "long": torch.randint(-(2**62), 2**62, (3, 1)),
    "short": torch.randint(-(2**15), 2**15, (9,), dtype=torch.int16),
    "int": torch.randint(-(2**31), 2**31, (2, 8), dtype=torch.int32),
    "float": torch.randn(1, 1, 2, 3),
    "brain": torch.randn(4).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "turned": torch.randn(4, 6).t(),
    "every other": torch.arange(20)[::2],
    'a "name"\n\x1b[2J ü': torch.ones(2, requires_grad=True),
}


def test_tensors_against_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer.write_tensors(path, TENSORS, {"format": "pt", "a": 'b"\n'})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": 'b"\n'}
    ours = writer.read_tensors(path)
    assert ours.keys() == TENSORS.keys()
    assert all(ours[name].dtype == t.dtype and torch.equal(ours[name], t) for name, t in TENSORS.items())
    assert torch.equal(writer.read_tensor(path, "int"), TENSORS["int"])


def test_reading_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    plain = {name: t.detach().contiguous() for name, t in TENSORS.items()}
    save_file(plain, path)
    read = writer.read_tensors(path)
    assert read.keys() == plain.keys() and all(torch.equal(read[name], plain[name]) for name in plain)


def test_a_tensor_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rows = torch.randn(7, 3).half()
    in_pieces = Planned(name="x", dtype=torch.float16, shape=(7, 3), make=lambda: iter(rows.split(2)))
    writer.write_planned(path, [in_pieces, planned("y", rows)])
    assert all(torch.equal(tensor, rows) for tensor in load_file(path).values())
    for made in (rows[:6], rows.float()):
        broken = Planned(name="x", dtype=torch.float16, shape=(7, 3), make=lambda made=made: iter(made.split(2)))
        with pytest.raises(ValueError, match="x: made"):
            writer.write_planned(tmp_path / "z.safetensors", [broken])
    assert names(tmp_path) == ["x.safetensors"]


def test_no_tensors_at_all(tmp_path: Path) -> None:
    writer.write_tensors(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {} == writer.read_tensors(tmp_path / "x.safetensors")


def test_every_tensor_lies_where_it_can_be_viewed(tmp_path: Path) -> None:
    """Odd sizes in between must not put wider items at addresses they do not divide; the rest keeps its order."""
    path = tmp_path / "x.safetensors"
    writer.write_tensors(path, TENSORS)
    text = path.read_bytes()
    length = int.from_bytes(text[:8], "little")
    assert length % 8 == 0
    header = json.loads(text[8 : 8 + length])
    for name, entry in header.items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0, name
    even = [name for name, t in TENSORS.items() if t.numel() * t.element_size() % 8 == 0]
    placed = sorted((n for n in even if TENSORS[n].numel()), key=lambda n: header[n]["data_offsets"][0])
    assert placed == [name for name in even if TENSORS[name].numel()]


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []  # the memory itself: a tensor object may be gone while a view lives

    def make() -> torch.Tensor:
        assert all(ref() is None for ref in alive), "an earlier tensor is still there"
        memory = np.full((8, 8), len(alive), dtype=np.float32)
        alive.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    plan = [Planned(name=str(i), dtype=torch.float32, shape=(8, 8), make=make) for i in range(5)]
    writer.write_planned(tmp_path / "x.safetensors", plan)
    assert len(alive) == 5
    assert load_file(tmp_path / "x.safetensors")["3"][0, 0] == 3


@pytest.mark.parametrize("made", [torch.zeros(2, 3), torch.zeros(3, 2).half()], ids=["shape", "dtype"])
def test_a_tensor_that_is_not_what_was_planned(made: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(OLD)
    plan = Planned(name="m.weight", dtype=torch.float32, shape=(3, 2), make=lambda: made)
    with pytest.raises(ValueError, match=r"m\.weight"):
        writer.write_planned(path, [plan])
    assert path.read_bytes() == OLD and names(tmp_path) == ["x.safetensors"]


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two tensors"):
        writer.write_planned(tmp_path / "x", [planned("a", torch.ones(1)), planned("a", torch.ones(1))])
    assert names(tmp_path) == []


# --- what the system refuses -------------------------------------------------------------------------------------

REFUSED = {
    "full disk": ("write", errno.ENOSPC, "disk is full"),
    "full disk, noticed at the end": ("fsync", errno.ENOSPC, "disk is full"),
    "full disk, noticed at closing": ("close", errno.ENOSPC, "disk is full"),
    "quota": ("write", errno.EDQUOT, "quota"),
    "file too big": ("write", errno.EFBIG, "larger than"),
    "read-only disk": ("open", errno.EROFS, "read-only"),
    "read-only folder": ("open", errno.EACCES, "no permission"),
    "immutable": ("replace", errno.EPERM, "no permission"),
    "broken disk": ("fsync", errno.EIO, os.strerror(errno.EIO)),
    "lost network drive": ("write", errno.ESTALE, "folder is gone"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_leave_the_old_file_and_nothing_else(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, number, words = REFUSED[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(OLD)
    real = getattr(os, call)

    def refuse(*args: object, **options: object) -> None:
        if call == "close":
            real(*args)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, refuse)
        with pytest.raises(StorageError) as caught:
            writer.write_tensors(path, {"a": torch.ones(100)})
    assert str(path) in caught.value.problem and words in caught.value.problem
    assert "\n" not in caught.value.problem and caught.value.hint
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["x.safetensors"]


def test_a_file_that_may_not_grow(small_files: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(OLD)
    with pytest.raises(StorageError, match="larger than"):
        writer.write_tensors(path, {"a": torch.ones(2 * small_files)})
    assert path.read_bytes() == OLD and names(tmp_path) == ["x.safetensors"]


def test_a_short_write_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    tensor = torch.arange(1000)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", lambda descriptor, data: real(descriptor, data[:777]))
        writer.write_tensors(tmp_path / "x", {"a": tensor})
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, OSError])
def test_what_the_tensors_raise_passes_through(stop: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(OLD)

    def make() -> torch.Tensor:
        assert names(tmp_path) == ["x", "x.partial"]
        raise stop("mine")

    with pytest.raises(stop, match="mine"):
        writer.write_planned(path, [Planned(name="a", dtype=torch.float32, shape=(1,), make=make)])
    assert path.read_bytes() == OLD and names(tmp_path) == ["x"]


def test_vanished_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="folder is gone"):
        files.write_bytes(tmp_path / "gone" / "x", b"1")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="folder is gone"):
        files.write_bytes(tmp_path / "file" / "x", b"1")


def test_folder_that_vanishes_in_between(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()

    def pieces() -> Iterator[bytes]:
        yield b"1"
        folder.rename(tmp_path / "elsewhere")
        yield b"2"

    with pytest.raises(StorageError, match="folder is gone"):
        files.write_pieces(folder / "x", pieces())


def test_never_through_a_link_left_under_the_partial_name(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(OLD)
    (tmp_path / "x.partial").symlink_to(tmp_path / "precious")
    files.write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "precious").read_bytes() == OLD and (tmp_path / "x").read_bytes() == b"new"
    assert not (tmp_path / "x").is_symlink()


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(StorageError):
        files.write_bytes(tmp_path / "x", b"1")
    assert names(tmp_path) == ["x"]


def test_disks_that_cannot_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "no")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        files.write_bytes(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_data_and_names_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    flush, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        flush(descriptor)

    def replace(*paths: Path) -> None:
        calls.append("rename")
        rename(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        patch.setattr(files.os, "replace", replace)
        files.write_bytes(tmp_path / "x", b"1")
    assert calls == ["file", "rename", "folder"]


# --- reading, cleaning, space ------------------------------------------------------------------------------------


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for read in (files.read_json, writer.read_tensors):
        with pytest.raises(StorageError, match=str(path)):
            read(path)
        for damage in (b"", b"{", b'{"a": NaN}', b"[1]", b"\xff" * 40):
            path.write_bytes(damage)
            with pytest.raises(StorageError, match=str(path)):
                read(path)
        path.unlink()
    writer.write_tensors(path, {"a": torch.ones(10)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="truncated"):
        writer.read_tensors(path)
    writer.write_tensors(path, {"a": torch.ones(10)})
    with pytest.raises(StorageError, match="tensor b"):
        writer.read_tensor(path, "b")


def test_remove_partials(tmp_path: Path) -> None:
    for name in ("x.partial", ".y.partial", "keep", "partial", "keep.partial.json"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "link.partial").symlink_to(tmp_path / "keep")
    (tmp_path / "folder.partial").mkdir()
    files.remove_partials(tmp_path)
    assert names(tmp_path) == ["folder.partial", "keep", "keep.partial.json", "partial"]
    with pytest.raises(StorageError, match="gone"):
        files.remove_partials(tmp_path / "gone")


def test_require_space(tmp_path: Path) -> None:
    files.require_space(tmp_path / "not" / "yet", 1, "a byte")
    with pytest.raises(StorageError) as caught:
        files.require_space(tmp_path / "not" / "yet", 2**70, "the finished model")
    assert "the finished model needs 1099511627776.00 GiB" in caught.value.problem
    assert str(tmp_path / "not" / "yet") in caught.value.problem
    assert not (tmp_path / "not").exists()
