"""Buffers on huge pages: as good as torch's own, and gone when the last view is."""

import gc

import pytest
import torch

from exl_runtime import memory


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("nbytes", [0, 1, memory.LEAST - 1, memory.LEAST, memory.LEAST + 1, 3 * memory.LEAST - 5])
def test_a_buffer_has_the_size_asked_for_and_holds_what_is_written(nbytes: int) -> None:
    buffer = memory.empty_bytes(nbytes)
    assert buffer.dtype == torch.uint8 and buffer.shape == (nbytes,)
    buffer.fill_(7)
    assert int(buffer.sum()) == 7 * nbytes
    if nbytes >= memory.LEAST:
        assert buffer.data_ptr() % memory.HUGE == 0


def test_a_view_keeps_the_memory_and_its_end_frees_it() -> None:
    gc.collect()  # what earlier tests left must not go in between
    before = resident()
    view = memory.empty_bytes(64 << 20).fill_(1)[: 32 << 20].view(torch.int32)
    gc.collect()
    assert int(view[-1]) == 0x01010101
    assert resident() - before > 60 << 20
    del view
    assert resident() - before < 8 << 20


def test_without_room_for_a_mapping_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no mapping left")

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    assert memory.empty_bytes(memory.LEAST).numel() == memory.LEAST
