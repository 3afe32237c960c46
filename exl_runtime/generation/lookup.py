"""Guesses of what follows, from what stood there before: the longest earlier occurrence of the last tokens.

Token ids only. A wrong guess costs time, never a wrong token, so nothing here has to be exact.
"""

from collections.abc import Sequence

LEAST = 3  # tokens that have to agree before an earlier place says anything
PLACES = 8  # latest occurrences that are compared
LONGEST = 64  # agreement beyond this makes no guess better
CAPACITY = 1 << 17  # tokens that a shared memory of old replies keeps


class SuffixIndex:
    """Tokens, and where each run of LEAST of them ended before."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        start = len(self.tokens)
        self.tokens += tokens
        for end in range(max(start + 1, LEAST), len(self.tokens) + 1):
            places = self._ends.setdefault(tuple(self.tokens[end - LEAST : end]), [])
            places.append(end)
            if len(places) > PLACES + 1:  # one of them may be the end itself
                del places[0]

    def find(self, last: Sequence[int], most: int) -> tuple[list[int], int]:
        """(guess, agreement): at most `most` tokens that followed the longest, then latest, match with the end of
        `last`, and how many tokens agree there. ([], 0) when fewer than LEAST do."""
        tokens, best, place = self.tokens, 0, 0
        for end in reversed(self._ends.get(tuple(last[-LEAST:]), ())):
            if end == len(tokens):  # nothing follows
                continue
            length = LEAST
            while length < min(end, len(last), LONGEST) and tokens[end - length - 1] == last[-length - 1]:
                length += 1
            if length > best:
                best, place = length, end
        if not best:
            return [], 0
        guess = tokens[place : place + most]
        while guess and len(guess) < most and tokens[-LEAST:] == list(last[-LEAST:]):
            # The earlier place runs into the present: a loop, which is guessed to go on.
            guess += tokens[place : place + most - len(guess)]
        return guess, best


class Memory:
    """Replies of the past, of all requests: a story told again, a list copied from another conversation."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._index = SuffixIndex()

    def add(self, tokens: Sequence[int]) -> None:
        """Keep a text. When there is too much, the older half goes."""
        self._index.extend([*tokens[-self._capacity // 2 :], -1])  # -1: texts do not run into each other
        if len(self._index.tokens) > self._capacity:
            self._index = SuffixIndex(self._index.tokens[-self._capacity // 2 :])

    def find(self, last: Sequence[int], most: int) -> tuple[list[int], int]:
        """As `SuffixIndex.find`; a guess ends where the old text did."""
        guess, agreement = self._index.find(last, most)
        return (guess[: guess.index(-1)] if -1 in guess else guess), agreement
