"""Grammars at work: which tokens may come next. The work itself is done by llguidance.

llguidance is an optional extra (`pip install exl-runtime[grammar]`); it is imported when the first grammar is used.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .grammar import Grammar

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer

SPACES = r"[ \n\r\t]{0,32}"  # between the parts of JSON; without a limit a small model may write blanks for ever
_PUNCTUATION = frozenset("\\.+*?()|[]{}^$#&-~/<>=!:,\"'")


class Matcher:
    """Where one reply is in its grammar. Tokens in, masks out."""

    def __init__(self, matcher: Any, vocab_size: int, ends: NDArray[np.int64]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = ends

    @property
    def finished(self) -> bool:
        """True when nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """bool (vocab,): what may come next. Every end token counts as the end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.zeros(self._vocab_size, dtype=np.bool_)
        flat = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        mask[: flat.size] = flat
        if self._ends.size:
            mask[self._ends] = bool(mask[self._ends].any())
        return mask

    def accept(self, token: int) -> None:
        """`token` was drawn; an end token changes nothing."""
        if token not in self._ends and not self._matcher.consume_token(token):
            self._check()

    def back(self, count: int) -> None:
        """The last `count` accepted tokens were taken back."""
        self._matcher.rollback(count)

    def fitting(self, tokens: list[int]) -> int:
        """How many of the first `tokens` may follow here; for guesses."""
        return int(self._matcher.validate_tokens(tokens))

    def forced(self) -> list[int]:
        """Tokens that have to come next, as the tokenizer would cut them; for guesses."""
        return list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the grammar cannot go on: {_first_line(self._matcher.get_error())}")


class GrammarCompiler:
    """Makes matchers for the tokens of one model; what is slow about it is done once, at the first grammar."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = np.array(sorted(token for token in eos_ids if token < vocab_size), dtype=np.int64)
        self._tokens: Any = None

    def matcher(self, grammar: Grammar) -> Matcher:
        """Raises UsageError when llguidance is not installed, or does not understand the grammar."""
        try:
            import llguidance
        except ImportError as err:
            raise UsageError("grammars need the package llguidance", hint="pip install llguidance") from err
        source = _source(grammar, llguidance.LLMatcher)
        if self._tokens is None:
            ends = self._ends.tolist() or None
            self._tokens = llguidance.LLTokenizer(self._tokenizer.as_json(), n_vocab=self._vocab_size, eos_token=ends)
        matcher = llguidance.LLMatcher(self._tokens, source, log_level=0)
        if matcher.is_error():
            raise UsageError(f"{NAMES[grammar.kind]} cannot be used: {_first_line(matcher.get_error())}")
        return Matcher(matcher, self._vocab_size, self._ends)


NAMES = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "lark": "the grammar",
    "choice": "the choice",
}


def _source(grammar: Grammar, make: Any) -> str:
    if grammar.kind == "json_schema":
        # Read and written separators are the model's own choice; only endless blanks are not.
        options = {"whitespace_pattern": SPACES}
        return str(make.grammar_from_json_schema(grammar.text, overrides=options))
    if grammar.kind == "lark":
        return str(make.grammar_from_lark(grammar.text))
    pattern = grammar.text
    if grammar.kind == "choice":
        pattern = "|".join("".join(_quoted(c) for c in option) for option in json.loads(grammar.text))
    return str(make.grammar_from_regex(pattern))


def _quoted(char: str) -> str:
    return f"\\x{{{ord(char):x}}}" if char in _PUNCTUATION or char.isspace() else char


def _first_line(message: str) -> str:
    return next((line.strip() for line in str(message).splitlines() if line.strip()), "unknown reason")
