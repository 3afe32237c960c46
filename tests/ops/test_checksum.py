"""The checksum of packed models: its definition, and that any change shows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.ops import native

pytestmark = pytest.mark.usefixtures("kernels")
WORD = 1 << 64


def step(lane: int, word: int) -> int:
    mixed = (lane ^ word) * 0x9E3779B97F4A7C15 % WORD
    return (mixed << 29 | mixed >> 35) % WORD


def defined(data: bytes) -> int:
    """See ext/cpu/checksum.h."""
    padded = data + bytes(-len(data) % 64)
    lanes = [i + 1 for i in range(8)]
    for at in range(0, len(padded), 8):
        lane = at // 8 % 8
        lanes[lane] = step(lanes[lane], int.from_bytes(padded[at : at + 8], "little"))
    result = 0
    for lane in lanes:
        result = step(result, lane)
    return step(result, len(data))


def checksum(data: bytes) -> int:
    return native.ops().checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8)) % WORD


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=300))
def test_it_is_what_the_header_says(data: bytes) -> None:
    assert checksum(data) == defined(data)


def test_every_single_bit_and_the_length_count() -> None:
    data = bytes(range(200))
    seen = {checksum(data + b"\0"), checksum(data[:-1])}
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(checksum(bytes(changed)))
    assert checksum(data) not in seen


def test_two_top_bits_of_a_lane_do_not_cancel() -> None:
    changed = bytearray(bytes(256))
    changed[7], changed[71] = 0x80, 0x80  # words 0 and 8: both in lane 0
    assert checksum(bytes(changed)) != checksum(bytes(256))


def test_only_whole_bytes_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="dtype Byte"):
        native.ops().checksum(torch.zeros(8))
    with pytest.raises(RuntimeError, match="must have shape"):
        native.ops().checksum(torch.zeros(2, 8, dtype=torch.uint8))
