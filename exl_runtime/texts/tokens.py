"""The ids of running text, piece by piece.

Text that spells out a control token ("</s>" on a web page) is encoded as ordinary text, as it is in a chat.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..tokenizer.protect import control_pattern, mark
from ..tokenizer.tokenizer import Tokenizer
from .documents import PIECE, read_documents, regroup

Encode = Callable[[str, bool], list[int]]  # (text, continued): ids without BOS; continued: in the middle of a text


def token_pieces(paths: Sequence[Path], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """int32 ids of all files, one file after another, no BOS; a piece is the ids of about 64 KiB of text.

    A file of any size is read in bounded memory. Raises DataError as `read_documents` does, or for no file at all.
    """
    if not paths:
        raise DataError("no file with text given")
    encode = plain_encoder(tokenizer)
    for path in paths:
        yield from encoded(read_documents(path), encode)


def plain_encoder(tokenizer: Tokenizer) -> Encode:
    """encode(text, continued): ids without BOS; with `continued`, as in the middle of a text."""
    controls = control_pattern(tokenizer.control_texts())
    newline = tokenizer.encode_rendered("\n")

    def encode(text: str, continued: bool) -> list[int]:
        text = mark(text, controls)
        if continued:  # behind a newline, lest the start-of-text space of some tokenizers is put before it
            ids = tokenizer.encode_rendered("\n" + text)
            if ids[: len(newline)] == newline:
                return ids[len(newline) :]
        return tokenizer.encode_rendered(text)

    return encode


def encoded(texts: Iterable[str], encode: Encode) -> Iterator[np.ndarray]:
    """int32 ids of one running text, piece by piece."""
    for index, piece in enumerate(regroup(texts, PIECE)):
        yield np.array(encode(piece, index > 0), dtype=np.int32)
