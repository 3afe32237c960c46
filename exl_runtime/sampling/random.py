"""Random numbers as a pure function of (seed, index, stream): Philox4x32-10.

A counter-based generator has no state, so the number for a token does not depend on what else ran in the batch, on
cancelled requests, or on how often a token was redone.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from functools import lru_cache

DRAW = 0
"""Stream of the number that picks the token."""
COIN = 1
"""Stream of the number that decides whether XTC acts."""

_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32: four 32-bit words from a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left = 0xD2511F53 * c0
        right = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & _MASK, (left >> 32) ^ c3 ^ k1, left & _MASK
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


@lru_cache(maxsize=1024)  # who draws ahead of being asked wants each number twice
def uniform(seed: int, index: int, stream: int = DRAW) -> float:
    """A float64 in [0, 1), a multiple of 2^-53, for the `index`-th generated token of a request with this seed.

    The seed (64 bits) is the key; the counter holds the index (two words, low first), the stream, and 0. The number
    is the first two output words, word 0 above word 1, shifted right by 11.
    """
    counter = (index & _MASK, (index >> 32) & _MASK, stream, 0)
    word0, word1, _, _ = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return (((word0 << 32) | word1) >> 11) * 2.0**-53
