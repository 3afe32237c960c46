"""The code streams, against Python's own big integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.formats.bits import (
    BLOCK_CODES,
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_planar_columns,
    unpack_planar_rows,
    unpack_rows,
)

WIDTHS = (2, 3, 4, 5, 6, 8)


def stream(codes: list[int], bits: int) -> list[int]:
    """The words of one column as signed 32-bit numbers: one huge integer, cut into pieces."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    words = [(number >> (32 * t)) & 0xFFFFFFFF for t in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def random_codes(bits: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", WIDTHS)
def test_columns_are_streams_of_python_integers(bits: int) -> None:
    codes = random_codes(bits, 96, 5, seed=bits)
    words = torch.tensor([stream(codes[:, n].tolist(), bits) for n in range(5)]).t().to(torch.int32)
    assert torch.equal(pack_rows(codes, bits), words)
    assert torch.equal(unpack_rows(words, bits).long(), codes)


@pytest.mark.parametrize(
    ("bits", "index", "word", "low", "high"),
    [
        *[(3, 10, 0, 2, 1), (3, 21, 1, 1, 2)],
        *[(5, 6, 0, 2, 3), (5, 12, 1, 4, 1), (5, 19, 2, 1, 4), (5, 25, 3, 3, 2)],
        *[(6, 5, 0, 2, 4), (6, 10, 1, 4, 2)],
    ],
)
def test_codes_that_straddle_two_words(bits: int, index: int, word: int, low: int, high: int) -> None:
    """The table of formats/exl2.md 3.1, one code of all ones in a block of zeros."""
    codes = torch.zeros(BLOCK_CODES[bits], 1, dtype=torch.int64)
    codes[index] = (1 << bits) - 1
    expected = [0] * (BLOCK_CODES[bits] * bits // 32)
    expected[word] = ((1 << low) - 1) << (32 - low)
    expected[word + 1] = (1 << high) - 1
    packed = [value & 0xFFFFFFFF for value in pack_rows(codes, bits)[:, 0].tolist()]
    assert packed == expected
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits).long(), codes)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from((1, *WIDTHS)),
    blocks=st.integers(0, 4),
    columns=st.integers(0, 7),
    seed=st.integers(0, 2**31),
)
def test_pack_and_unpack_rows_are_inverse(bits: int, blocks: int, columns: int, seed: int) -> None:
    codes = random_codes(bits, blocks * BLOCK_CODES[bits], columns, seed)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (codes.shape[0] * bits // 32, columns)
    assert torch.equal(unpack_rows(packed, bits).long(), codes)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(WIDTHS), groups=st.integers(0, 4), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_pack_and_unpack_columns_are_inverse(bits: int, groups: int, columns: int, seed: int) -> None:
    codes = random_codes(bits, groups, columns, seed)
    packed = pack_columns(codes, bits)
    assert packed.shape == (groups, -(-columns * bits // 32))
    assert packed.tolist() == [stream(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_columns(packed, bits, columns).long(), codes)


def test_every_word_survives_unpack_and_pack() -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (30, 9), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    for bits in WIDTHS:
        assert torch.equal(pack_rows(unpack_rows(words, bits), bits), words)
        assert torch.equal(unpack_rows(words, bits, torch.float32).long(), unpack_rows(words, bits).long())


def test_planar_three_bit_by_hand() -> None:
    """formats/gptq.md 7: two words of the lower 2 bits (16 fields each), one word of the highest bit."""
    codes = random_codes(3, 64, 3, seed=5)
    words = []
    for block in (codes[:32], codes[32:]):
        for half in (block[:16], block[16:]):
            words.append(sum((half[i] & 3) << (2 * i) for i in range(16)))
        words.append(sum((block[i] >> 2) << i for i in range(32)))
    packed = torch.stack(words)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    assert torch.equal(unpack_planar_rows(packed, 3).long(), codes)
    assert torch.equal(unpack_planar_columns(packed.t().contiguous(), 3, 64).long(), codes.t())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_planar_equals_the_stream_where_one_plane_is_enough(bits: int) -> None:
    words = pack_rows(random_codes(bits, 64, 4, seed=bits), bits)
    assert torch.equal(unpack_planar_rows(words, bits), unpack_rows(words, bits))


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack_rows(torch.full((32, 1), 8), 3)
    with pytest.raises(ValueError, match="do not fit"):
        pack_rows(torch.full((32, 1), -1), 3)
    with pytest.raises(ValueError, match="whole blocks"):
        pack_rows(torch.zeros(31, 1, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="whole blocks"):
        unpack_rows(torch.zeros(4, 1, dtype=torch.int32), 5)
