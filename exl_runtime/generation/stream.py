"""What a running request reports, and the filter that lets text out as soon as no stop string can claim it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .request import Result, TokenLogprob
from .stops import find_stop, held_back


@dataclass(frozen=True, slots=True)
class Started:
    """Work on the prompt begins; `reused_tokens` of its tokens were in the cache."""

    request_id: str
    prompt_tokens: int
    reused_tokens: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt is computed, the first token is there, `seconds` after Started."""

    request_id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Text:
    """New text, never empty and ids not either at the same time, and the tokens generated since the last event.

    All texts of a request put together are Result.text, all ids Result.ids, all logprobs Result.logprobs.
    """

    request_id: str
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None


@dataclass(frozen=True, slots=True)
class Dropped:
    """The context overflowed: so many tokens (and whole turns of a conversation) are no longer seen."""

    request_id: str
    tokens: int
    turns: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that went well."""

    request_id: str
    result: Result


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that did not; `Generator.stream` raises the error instead of yielding this."""

    request_id: str
    error: Exception


Event: TypeAlias = Started | Prefilled | Text | Dropped | Finished | Failed


class Trim:
    """Text in, text out without its beginning `opening`, or without that but for a first space that was not shown."""

    def __init__(self, opening: str) -> None:
        self._opening = opening
        self._started = False

    def push(self, text: str) -> str:
        """What of `text` comes behind the opening; a text that goes another way is given up from there."""
        if not text or not self._opening:
            return text
        if not self._started and self._opening[0] == " " != text[0]:
            self._opening = self._opening[1:]
        self._started = True
        length = min(len(text), len(self._opening))
        if text[:length] != self._opening[:length]:
            self._opening = ""
            return text
        self._opening = self._opening[length:]
        return text[length:]


class StopStream:
    """Text in, text out, up to the first completed stop string, whatever the pieces in which the text arrives."""

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False  # a stop string was completed; nothing comes out any more

    def push(self, text: str) -> str:
        """The text that is now certain to be part of the reply."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = find_stop(text, self._stops)
        if found is not None:
            self.stopped = True
            self._held = ""
            return text[: found[0]]
        keep = held_back(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """No more text comes: what was held back is part of the reply after all."""
        rest, self._held = self._held, ""
        return rest
