"""The tokens so far, prompt and reply together, as one int64 array that grows by what is new.

Turning Python lists into an array at every token would cost more than the penalties that look at it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class History:
    """One per request. A prompt object must not be edited while it is in use; the reply may grow, shrink or change."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._buffer = np.empty(256, dtype=np.int64)
        self._prompt: Sequence[int] | None = None
        self._prompt_length = 0
        self._generated: list[int] = []

    def tokens(self, prompt: Sequence[int], generated: Sequence[int]) -> NDArray[np.int64]:
        """All tokens, oldest first.

        Ids outside the vocabulary become `vocab_size`: they hold a place, match each other, and are nobody's logit.
        """
        if prompt is not self._prompt or len(prompt) != self._prompt_length:
            self._write(0, prompt)
            self._prompt, self._prompt_length, self._generated = prompt, len(prompt), []
        known = len(self._generated)
        if len(generated) < known or list(generated[:known]) != self._generated:
            known = 0
        self._write(self._prompt_length + known, generated[known:])
        self._generated[known:] = generated[known:]
        return self._buffer[: self._prompt_length + len(generated)]

    def _write(self, start: int, ids: Sequence[int]) -> None:
        stop = start + len(ids)
        if stop > self._buffer.size:
            grown = np.empty(max(stop, 2 * self._buffer.size), dtype=np.int64)
            grown[:start] = self._buffer[:start]
            self._buffer = grown
        new = np.asarray(ids, dtype=np.int64)
        self._buffer[start:stop] = np.where((new >= 0) & (new < self._vocab_size), new, self._vocab_size)
