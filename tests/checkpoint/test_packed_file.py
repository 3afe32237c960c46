"""Files of packed models: back comes what went in, or a reason; never something else."""

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.checkpoint import packed_file
from exl_runtime.checkpoint.packed_file import Unusable, file_bytes, read, write
from exl_runtime.memory import ALIGN


def checksum(data: torch.Tensor) -> int:
    return zlib.crc32(data.numpy())


def some(*sizes: int) -> dict[str, torch.Tensor]:
    return {
        f"matrix {number}": torch.randint(
            0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        for number, size in enumerate(sizes)
    }


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "BLOCK", 4096)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(st.integers(0, 200), st.sampled_from([4032, 4096, 4097, 12288, 20000])), max_size=6))
def test_back_comes_what_went_in(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    path = tmp_path_factory.mktemp("packed") / "a.packed"
    buffers = some(*sizes)
    write(path, "key", buffers, checksum)
    found = read(path, "key", checksum)
    assert same(found, buffers)
    assert all(buffer.data_ptr() % ALIGN == 0 for buffer in found.values() if buffer.numel())
    assert path.stat().st_size <= file_bytes(buffers) + 1000 + 30 * sum(sizes) // 4096


def refused(path: Path, key: str = "key") -> str:
    with pytest.raises(Unusable) as caught:
        read(path, key, checksum)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.packed"
    write(path, "key", some(5000, 300, 9000), checksum)
    return path


def test_every_single_damaged_byte_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    kinds = set()
    for at in [*range(0, len(whole), 61), *range(len(whole) - 700, len(whole))]:
        changed = bytearray(whole)
        changed[at] ^= 0x10
        file.write_bytes(changed)
        kinds.add(refused(file))
    assert {"it is damaged", "its index is damaged", "it is cut short, or not a packed model"} <= kinds


def test_any_length_but_its_own_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        file.write_bytes(whole[:length])
        refused(file)
    file.write_bytes(whole + b"\0")
    refused(file)
    file.write_bytes(whole[:64] + whole[128:])  # a hole
    assert refused(file) == "its parts do not fit together"


def test_other_keys_other_files_and_none(file: Path, tmp_path: Path) -> None:
    assert "another model" in refused(file, "other")
    (tmp_path / "b.packed").write_bytes(b"something else" * 1000)
    assert "not a packed model" in refused(tmp_path / "b.packed")
    assert "No such file" in refused(tmp_path / "c.packed")
    assert "directory" in refused(tmp_path)


def test_no_memory_is_a_reason_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(nbytes: int) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(packed_file, "empty_bytes", none)
    assert "no memory" in refused(file)
