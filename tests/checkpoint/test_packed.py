"""The folder of packed models: which one belongs to a checkpoint, which ones stay, what a failure costs (nothing)."""

import logging
import os
import shutil
import time
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exl_runtime.checkpoint import packed
from exl_runtime.checkpoint.packed import NOT_KEPT, PackedCache
from exl_runtime.checkpoint.reader import Checkpoint

Usage = namedtuple("Usage", "total used free")


def checksum(data: torch.Tensor) -> int:
    return zlib.crc32(data.numpy())


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "cache" / "packed", checksum=checksum, layout="1", least=1000)


def model(tmp_path: Path, name: str = "model", value: float = 1.0, size: int = 4000) -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    save_file({"a.weight": torch.full((size // 4,), value)}, folder / "model.safetensors")
    return folder


def fill(cache: PackedCache, folder: Path, value: int = 7, configuration: object = None, size: int = 3000) -> None:
    """One load that finds nothing."""
    with Checkpoint.open(folder) as checkpoint:
        entry = cache.open(checkpoint, configuration)
    assert entry is not NOT_KEPT and entry.get("a") is None
    entry.add("a", torch.full((size,), value, dtype=torch.uint8))
    entry.keep()
    assert packed.finish()


def found(cache: PackedCache, folder: Path, configuration: object = None) -> int | None:
    """What a load finds, as one number."""
    with Checkpoint.open(folder) as checkpoint:
        buffer = cache.open(checkpoint, configuration).get("a")
    return None if buffer is None else int(buffer[-1])


def test_the_second_load_finds_it_and_nobody_else_can_read_it(cache, tmp_path) -> None:
    folder = model(tmp_path)
    fill(cache, folder)
    assert found(cache, folder) == 7
    (file,) = cache.folder.iterdir()
    assert file.name.startswith("model-") and file.name.endswith(".packed") and cache.models() == [file]
    assert cache.folder.stat().st_mode & 0o077 == 0
    assert cache.nbytes() == file.stat().st_size > 3000


def test_any_change_of_the_checkpoint_is_another_model(cache, tmp_path) -> None:
    folder = model(tmp_path)
    fill(cache, folder)
    assert found(cache, folder, {"bits": 4}) is None
    assert found(PackedCache(cache.folder, checksum=checksum, layout="2", least=1000), folder) is None
    assert found(cache, folder) == 7
    # The same size, the same header, the same time of modification: the time of change gives it away.
    file = folder / "model.safetensors"
    before = file.stat()
    time.sleep(0.02)
    model(tmp_path, value=2.0)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert found(cache, folder) is None
    # A copy of the folder is another place.
    shutil.copytree(folder, tmp_path / "copy")
    assert found(cache, tmp_path / "copy") is None


def test_a_new_version_of_a_model_replaces_the_old_one(cache, tmp_path) -> None:
    folder = model(tmp_path)
    fill(cache, folder, 1)
    model(tmp_path, size=8000)
    fill(cache, folder, 2)
    assert len(cache.models()) == 1 and found(cache, folder) == 2


def test_a_damaged_file_is_refused_removed_and_made_again(cache, tmp_path, caplog) -> None:
    folder = model(tmp_path)
    fill(cache, folder)
    (file,) = cache.models()
    data = bytearray(file.read_bytes())
    data[2000] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert found(cache, folder) is None
    assert "damaged; the model is packed again" in caplog.text and not file.exists()
    fill(cache, folder, 8)
    assert found(cache, folder) == 8


def test_the_models_used_last_stay(cache, tmp_path) -> None:
    folders = [model(tmp_path, f"m{number}") for number in range(packed.MODELS)]
    for age, folder in enumerate(folders):
        fill(cache, folder, age)
        os.utime(cache.models()[-1] if age else next(cache.folder.iterdir()), (1000 + age, 1000 + age))
    assert found(cache, folders[0]) == 0  # used now: the second is the oldest from here on
    fill(cache, model(tmp_path, "another"), 50)
    assert [found(cache, folder) for folder in folders] == [0, None, 2]
    assert len(cache.models()) == packed.MODELS


@pytest.mark.parametrize(("free", "kept"), [(20_000, True), (13_000, False)])
def test_a_share_of_the_disk_stays_free(cache, tmp_path, monkeypatch, free, kept) -> None:
    """Of 100 kB, 10 % have to stay free after the 3 kB that are written."""
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda folder: Usage(100_000, 0, free))
    folder = model(tmp_path)
    fill(cache, folder)
    assert found(cache, folder) == (7 if kept else None)
    assert len(cache.models()) == kept


def test_older_models_make_room(cache, tmp_path, monkeypatch) -> None:
    first, second = model(tmp_path, "first"), model(tmp_path, "second")
    fill(cache, first, 1)

    def usage(folder: Path) -> Usage:
        return Usage(100_000, 0, 16_000 - cache.nbytes())

    monkeypatch.setattr(packed.shutil, "disk_usage", usage)
    fill(cache, second, 2)
    assert found(cache, first) is None and found(cache, second) == 2


def test_small_models_are_not_kept(cache, tmp_path) -> None:
    with Checkpoint.open(model(tmp_path, size=900)) as checkpoint:
        assert cache.open(checkpoint) is NOT_KEPT
    # Large files of which little is repacked.
    fill(cache, model(tmp_path, "dense"), size=700)
    assert not cache.models() and not cache.folder.exists()
    NOT_KEPT.add("a", torch.zeros(1, dtype=torch.uint8))
    NOT_KEPT.keep()
    assert NOT_KEPT.get("a") is None


def test_a_folder_that_cannot_be_written_costs_a_line_in_the_log(cache, tmp_path, caplog) -> None:
    cache.folder.parent.mkdir()
    cache.folder.write_bytes(b"a file is in the way")
    with caplog.at_level(logging.WARNING):
        fill(cache, model(tmp_path))
    assert "not kept" in caplog.text
    assert cache.models() == [] and cache.nbytes() == 0 and cache.clear() == 0


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(cache, tmp_path) -> None:
    cache.folder.mkdir(parents=True)
    dead = cache.folder / "m-00-11.packed.999999999-1.partial"
    ours = cache.folder / f"m-00-11.packed.{os.getpid()}-1.partial"
    old = cache.folder / f"m-00-22.packed.{os.getpid()}-2.partial"
    foreign = cache.folder / "notes.txt"
    for path in (dead, ours, old, foreign):
        path.write_bytes(bytes(10))
    os.utime(old, (1000, 1000))
    fill(cache, model(tmp_path))
    assert not dead.exists() and ours.exists() and not old.exists() and foreign.exists()
    assert cache.clear() > 3000
    assert list(cache.folder.iterdir()) == [foreign]


def test_the_end_of_the_program_waits_but_not_for_ever(cache, tmp_path, monkeypatch) -> None:
    begun, go = packed.threading.Event(), packed.threading.Event()

    def slow(*arguments: object) -> None:
        begun.set()
        go.wait(10)

    monkeypatch.setattr(packed, "write", slow)
    with Checkpoint.open(model(tmp_path)) as checkpoint:
        entry = cache.open(checkpoint)
    entry.add("a", torch.zeros(3000, dtype=torch.uint8))
    entry.keep()  # returns at once
    assert begun.wait(10) and not packed.finish(0.01)
    go.set()
    assert packed.finish()
