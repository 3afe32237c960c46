"""The generator against the published known answers, and its numbers as numbers."""

import math
from itertools import pairwise

from exl_runtime.sampling.random import COIN, DRAW, philox4x32, uniform


def test_known_answers() -> None:
    """The three vectors for philox4x32-10 that come with Random123 (kat_vectors)."""
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_is_made_of_the_first_two_words() -> None:
    assert uniform(0, 0) == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) / 2**53


def test_uniform_depends_on_seed_index_and_stream_alone() -> None:
    seen = {
        uniform(seed, index, stream)
        for seed in (0, 1, 2**32, 2**64 - 1)
        for index in range(50)
        for stream in (DRAW, COIN)
    }
    assert len(seen) == 400
    assert uniform(7, 3) == uniform(7, 3)


def test_uniform_is_uniform() -> None:
    numbers = [uniform(123, i) for i in range(20_000)]
    assert all(0 <= u < 1 for u in numbers)
    assert abs(math.fsum(numbers) / 20_000 - 0.5) < 4 / math.sqrt(12 * 20_000)
    bins = [0] * 64
    for u in numbers:
        bins[int(u * 64)] += 1
    statistic = sum((seen - 312.5) ** 2 / 312.5 for seen in bins)
    assert statistic < 63 + 4.3 * math.sqrt(2 * 63)
    lag = math.fsum((a - 0.5) * (b - 0.5) for a, b in pairwise(numbers)) / 20_000 * 12
    assert abs(lag) < 4 / math.sqrt(20_000)
