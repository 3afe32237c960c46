"""What the tokens of a model spell, as bytes: for replies that have to begin with a given text."""

import re
from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import TokenizerError
from ..tokenizer.decoding import token_bytes

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """Immutable. Special tokens spell nothing."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int) -> None:
        self._bytes: dict[int, bytes] = {}
        for token in range(min(vocab_size, tokenizer.vocab_size)):
            if token not in tokenizer.special_ids and (spelled := _spelled(tokenizer, token)):
                self._bytes[token] = spelled
        self._sorted = sorted((spelled, token) for token, spelled in self._bytes.items())

    def spelled(self, token: int) -> bytes:
        """The bytes of a token; b"" for special tokens and for ids without one."""
        return self._bytes.get(token, b"")

    def extends(self, text: bytes) -> bool:
        """True when a token begins with `text` and goes on."""
        at = bisect_left(self._sorted, (text + b"\0", -1))
        return at < len(self._sorted) and self._sorted[at][0].startswith(text)

    def towards(self, text: bytes) -> NDArray[np.int64]:
        """Ids of the tokens with which `text` can begin, and of those that begin with all of it."""
        ids: list[int] = []
        for length in range(1, len(text)):
            part = text[:length]
            at = bisect_left(self._sorted, (part, -1))
            while at < len(self._sorted) and self._sorted[at][0] == part:
                ids.append(self._sorted[at][1])
                at += 1
        at = bisect_left(self._sorted, (text, -1))
        while at < len(self._sorted) and self._sorted[at][0].startswith(text):
            ids.append(self._sorted[at][1])
            at += 1
        return np.array(ids, dtype=np.int64)


def _spelled(tokenizer: "Tokenizer", token: int) -> bytes:
    try:
        piece = tokenizer.piece(token)
    except TokenizerError:  # a gap between the ids
        return b""
    text = tokenizer.text_of(token)
    if "\ufffd" not in text:
        return text.encode("utf-8")
    match = _BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else token_bytes(piece)
