"""What a conversion takes: estimates that grow with what they should, and refusals before any work."""

import os
from collections import namedtuple
from pathlib import Path

import pytest
from converting import Disk, convert, in_a_hurry, options, small_model

from convert import resources
from convert.resources import chunk_rows, measured_rows, memory_needed, require_disk, require_memory, widest
from convert.source import Source
from exl_runtime import files
from exl_runtime.errors import OutOfMemory, StorageError

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    with Source.open(small_model("llama", tmp_path_factory.mktemp("models"))) as opened:
        yield opened


def test_chunks(source: Source) -> None:
    assert widest(source.spec) == 64
    assert chunk_rows(source.spec, 512) == 2**24 // (512 * 64)
    assert chunk_rows(source.spec, 2**30) == 1
    assert measured_rows(128, 512) == 16 and measured_rows(128, 8192) == 8 and measured_rows(4, 8192) == 4


def test_memory(source: Source) -> None:
    needed = memory_needed(source, 16, 64, 1)
    assert resources.BASE < needed < resources.BASE + 10 * 2**20
    assert memory_needed(source, 16, 64, 100) > needed
    require_memory(source, 16, 64, 1, needed)
    with pytest.raises(OutOfMemory, match=r"takes about 0\.6 GiB of memory, 0\.6 GiB are free"):
        require_memory(source, 16, 64, 1, needed - 1)


class Disks:
    """Pretends that folders lie on disks with so many bytes free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Source, tmp_path: Path) -> None:
        self.source, self.work, self.out = source, tmp_path / "work", tmp_path / "out"
        self.free = {self.work: 2**60, self.out: 2**60}
        self.same = False
        monkeypatch.setattr(resources, "_device", lambda folder: 0 if self.same else hash(folder))
        monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: Usage(0, 0, self.free[Path(folder)]))
        for folder in self.free:
            folder.mkdir()

    def needs(self, out: bool = True) -> dict[str, int]:
        """The least free bytes with which each disk is enough."""
        found = {}
        for folder in (self.work, self.out) if out else (self.work,):
            low, high = -1, 2**40
            while high - low > 1:
                self.free[folder] = (low + high) // 2
                try:
                    require_disk(
                        self.source,
                        self.work,
                        self.out if out else None,
                        16,
                        64,
                        target=5.0 if out else None,
                        head_bits=6,
                    )
                    high = self.free[folder]
                except StorageError:
                    low = self.free[folder]
            self.free[folder] = 2**60
            found[folder.name] = high
        return found


def test_disk(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = Disks(monkeypatch, source, tmp_path)
    table = 2 * 70 * 32
    apart = disks.needs()
    weights = apart["out"] - table
    assert source.parameters * 5 / 8 < weights < source.parameters * 5 / 8 + source.head_parameters * 2
    states = 4 * 16 * 64 * (4 * 32 + 2 * 64) + 2 * 4 * 32 * 32
    assert apart["work"] == states + weights
    disks.same = True
    assert disks.needs()["out"] == apart["out"] + apart["work"]
    measuring = disks.needs(out=False)["work"]
    assert measuring == 4 * 16 * 64 * 32 * (2 + 3)
    # What an earlier run left is part of what is needed, and takes its place already.
    (disks.work / "states").mkdir()
    (disks.work / "states" / "x").write_bytes(bytes(1000))
    assert disks.needs()["out"] == apart["out"] + apart["work"] - 1000


def test_too_small_a_disk_is_one_line(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = Disks(monkeypatch, source, tmp_path)
    disks.free[disks.work] = 10
    with pytest.raises(StorageError, match="the work folder needs") as caught:
        require_disk(source, disks.work, disks.out, 16, 64, target=5.0, head_bits=6)
    assert "\n" not in caught.value.problem and "free" in caught.value.hint


def test_devices_of_folders_that_do_not_exist_yet(tmp_path: Path) -> None:
    assert resources._device(tmp_path / "a" / "b") == os.stat(tmp_path).st_dev


def test_estimates_cover_a_real_job(source: Source, tmp_path: Path) -> None:
    """The disk a conversion has used at its height is less than what it was let begin with."""
    most = 0

    def measure(kind: str) -> None:
        nonlocal most
        if kind in ("name", "remove"):
            most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))

    promised = []
    with pytest.MonkeyPatch.context() as patch, in_a_hurry():
        patch.setattr(resources, "require_space", lambda folder, needed, what: promised.append(needed))
        with Disk(measure):
            convert(options(source.folder, tmp_path / "out", rows=64))
    small = 200_000  # calibration, headers, JSON files: of no account for a real model
    assert most < max(promised) + small < 2 * most
