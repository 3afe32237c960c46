"""Do two tokenizers mean the same by their ids? Guesses of one model for another, and comparisons, depend on it."""

from ..errors import TokenizerError
from .tokenizer import Tokenizer


def first_difference(a: Tokenizer, b: Tokenizer) -> tuple[int, str | None, str | None] | None:
    """(id, its token in `a`, in `b`) of the least id that is not the same token in both, None for none there; or None.

    Ids from 0 to the end of the larger vocabulary.
    """
    for index in range(max(a.vocab_size, b.vocab_size)):
        first, second = _piece(a, index), _piece(b, index)
        if first != second:
            return index, first, second
    return None


def _piece(tokenizer: Tokenizer, index: int) -> str | None:
    try:
        return tokenizer.piece(index)
    except TokenizerError:  # a gap between the ids, or behind the last
        return None
