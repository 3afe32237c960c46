"""Hidden states in memory and in a file: the same to every caller, and plain words when the disk fails."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import same_bits

from convert.states import States
from exl_runtime.errors import ConvertError, StorageError

SHAPE = (5, 3, 4)


def values(rows: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, *SHAPE[1:]), generator=torch.Generator().manual_seed(seed))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "file"])
def test_rows_come_back(on_disk: bool, tmp_path: Path) -> None:
    states = States(SHAPE, tmp_path / "states.f32" if on_disk else None)
    assert states.rows == 5 and states.nbytes == 4 * 5 * 3 * 4
    wanted = values()
    states.write(0, wanted[:2])
    states.write(2, wanted[2:])
    for start, stop in ((0, 5), (0, 1), (1, 4), (4, 5)):
        assert same_bits(states.read(start, stop), wanted[start:stop])
    other = values(2, seed=1)
    states.write(1, other)
    assert same_bits(states.read(0, 5), torch.cat([wanted[:1], other, wanted[3:]]))
    states.discard()


def test_any_float_and_any_memory_layout(tmp_path: Path) -> None:
    for path in (None, tmp_path / "states.f32"):
        states = States(SHAPE, path)
        states.write(0, values().double())
        assert same_bits(states.read(0, 5), values())
        states.write(0, values().bfloat16())
        assert same_bits(states.read(0, 5), values().bfloat16().float())
        turned = values().permute(2, 1, 0).contiguous().permute(2, 1, 0)
        states.write(0, turned.requires_grad_() if path else turned)
        assert same_bits(states.read(0, 5), values())
        states.discard()


def test_the_file_is_plain_float32(tmp_path: Path) -> None:
    path = tmp_path / "states.f32"
    states = States(SHAPE, path)
    assert path.stat().st_size == states.nbytes  # its space is taken from the start
    states.write(0, values())
    assert np.array_equal(np.fromfile(path, np.float32).reshape(SHAPE), values().numpy())
    states.close()


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    """In a file; a change of what was read changes nothing."""
    states = States(SHAPE, tmp_path / "states.f32")
    states.write(0, values())
    states.read(0, 5).zero_()
    assert same_bits(states.read(0, 5), values())
    states.close()


def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may move fewer bytes than asked for, above 2 GiB always."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:5]], at))
    states = States(SHAPE, tmp_path / "states.f32")
    states.write(0, values())
    assert same_bits(states.read(1, 5), values()[1:])
    states.close()


def test_a_file_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "states.f32"
    first = States(SHAPE, path)
    first.write(0, values())
    first.close()
    again = States(SHAPE, path, existing=True)
    assert same_bits(again.read(0, 5), values())
    again.write(3, values(1, seed=2))
    again.close()
    assert same_bits(States(SHAPE, path, existing=True).read(3, 4), values(1, seed=2))
    # without `existing` it is made anew
    fresh = States(SHAPE, path)
    assert not fresh.read(0, 5).any()
    fresh.close()


def test_committing_renames(tmp_path: Path) -> None:
    partial, final = tmp_path / "states.partial", tmp_path / "states.f32"
    final.write_bytes(b"old")
    states = States(SHAPE, partial)
    states.write(0, values())
    assert final.read_bytes() == b"old"
    states.commit(final)
    assert states.path == final and not partial.exists()
    assert final.stat().st_size == states.nbytes
    assert same_bits(states.read(0, 5), values())  # and goes on working
    states.discard()
    assert not final.exists()


def test_committing_reaches_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("sync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    states = States(SHAPE, tmp_path / "a")
    states.commit(tmp_path / "b")
    assert done == ["sync", "rename", "sync"]
    states.close()


def test_closing_and_discarding(tmp_path: Path) -> None:
    path, before = tmp_path / "states.f32", open_files()
    states = States(SHAPE, path)
    assert open_files() == before + 1
    states.close()
    states.close()
    assert open_files() == before and path.exists()
    states.discard()
    states.discard()
    assert not path.exists()
    States(SHAPE).discard()


# --- the disk fails ----------------------------------------------------------------------------------------------


def refuse(number: int):
    def refused(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    return refused


def test_no_room_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any work is done; nothing is left open, nothing is left behind."""
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    before = open_files()
    with pytest.raises(StorageError, match=r"states\.f32: .*the disk is full") as caught:
        States(SHAPE, tmp_path / "states.f32")
    assert "\n  hint: free some space" in str(caught.value)
    assert open_files() == before and not list(tmp_path.iterdir())


def test_systems_that_reserve_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    states = States(SHAPE, tmp_path / "states.f32")
    states.write(2, values(1))
    assert (tmp_path / "states.f32").stat().st_size == states.nbytes
    assert same_bits(states.read(2, 3), values(1))
    states.close()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone/states\.f32: .*its folder is gone"):
        States(SHAPE, tmp_path / "gone" / "states.f32")
    with pytest.raises(StorageError, match=r"states\.f32"):
        States(SHAPE, tmp_path / "states.f32", existing=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("pwrite", errno.ENOSPC, "the disk is full"),
        ("pwrite", errno.EDQUOT, "quota"),
        ("preadv", errno.EIO, os.strerror(errno.EIO)),
        ("fsync", errno.EIO, os.strerror(errno.EIO)),
        ("replace", errno.EROFS, "read-only"),
    ],
)
def test_the_disk_fails_later(
    call: str, number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = States(SHAPE, tmp_path / "states.f32")
    monkeypatch.setattr(os, call, refuse(number))

    def use() -> None:
        states.write(0, values())
        states.read(0, 5)
        states.commit(tmp_path / "final.f32")

    with pytest.raises(StorageError, match=words) as caught:
        use()
    assert ".f32" in str(caught.value)
    states.close()


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "states.f32"
    states = States(SHAPE, path)
    states.write(0, values())
    states.close()
    os.truncate(path, states.nbytes - 4)
    again = States(SHAPE, path, existing=True)
    assert same_bits(again.read(0, 4), values()[:4])
    with pytest.raises(ConvertError, match=r"states\.f32: 236 bytes, 240 wanted"):
        again.read(3, 5)
    again.close()
