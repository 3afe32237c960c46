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


def test_an_arena_hands_out_neighbours_and_grows() -> None:
    arena = memory.Arena(8 << 20)
    buffers = [arena.take(size).fill_(number) for number, size in enumerate((1, 64, 100, 5 << 20, 0, 9 << 20, 3))]
    for number, buffer in enumerate(buffers):
        assert buffer.data_ptr() % memory.ALIGN == 0 or not buffer.numel()
        assert int(buffer.sum()) == number * buffer.numel()
    assert buffers[1].data_ptr() == buffers[0].data_ptr() + memory.ALIGN
    assert buffers[2].data_ptr() == buffers[1].data_ptr() + 64
    assert buffers[3].data_ptr() == buffers[2].data_ptr() + 128
    assert arena.nbytes == 64 + 64 + 128 + (5 << 20) + (9 << 20) + 64


def test_an_arena_takes_only_the_memory_that_is_written_to() -> None:
    gc.collect()
    before = resident()
    arena = memory.Arena(1 << 30)
    small = [arena.take(1 << 20).fill_(1) for _ in range(3)]
    assert resident() - before < 6 * memory.HUGE
    assert len({buffer.untyped_storage().data_ptr() for buffer in small}) == 1


def test_an_arena_lives_as_long_as_what_it_gave() -> None:
    gc.collect()
    before = resident()
    arena = memory.Arena(64 << 20)
    first, second = arena.take(32 << 20).fill_(1), arena.take(16 << 20).fill_(2)
    del arena, first
    gc.collect()
    assert int(second[-1]) == 2
    del second
    assert resident() - before < 8 << 20


def test_scratch_is_lent_again_and_a_large_piece_is_not_kept_for_small_ones() -> None:
    scratch = memory.Scratch()
    first = scratch.lend(5 << 20)
    again = scratch.lend(3 << 20)
    assert again.data_ptr() == first.data_ptr() and again.numel() == 3 << 20
    gc.collect()
    before = resident()
    scratch.lend(64 << 20).fill_(1)
    assert resident() - before > 60 << 20
    scratch.lend(1 << 20)
    assert resident() - before < 16 << 20
