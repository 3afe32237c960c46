"""Incremental decoding: one id in, the text that is safe to show out.

For every sequence, `"".join(push(id) for id in ids) + finish()` equals `Tokenizer.decode(ids)`, whatever it is cut
into; half a UTF-8 character is never shown, and each push costs the same however long the text is.
"""

from collections.abc import Callable, Sequence

from .decoding import Stage


class Detokenizer:
    """One stream of ids. Not reusable: `finish` ends it."""

    def __init__(
        self,
        token_of: Callable[[int], str | None],
        stages: list[Stage] | None,
        decode_whole: Callable[[Sequence[int]], str],
    ) -> None:
        """`token_of(id)` is None for ids that show nothing. `stages` None: the decoder cannot be streamed, so the
        text comes out at `finish`, from `decode_whole(ids)`."""
        self._token_of = token_of
        self._stages = stages
        self._decode_whole = decode_whole
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty. Ids without a token show nothing."""
        token = self._token_of(token_id)
        if self._stages is None:
            self._ids.append(token_id)
            return ""
        return "" if token is None else self._through(self._stages, [token])

    def finish(self) -> str:
        """What was still held back: an unfinished character becomes U+FFFD."""
        if self._stages is None:
            text, self._ids = self._decode_whole(self._ids), []
            return text
        text = ""
        for index, stage in enumerate(self._stages):
            text += self._through(self._stages[index + 1 :], stage.finish())
        return text

    @staticmethod
    def _through(stages: list[Stage], pieces: list[str]) -> str:
        for stage in stages:
            pieces = stage.push(pieces)
        return "".join(pieces)
