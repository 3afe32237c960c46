"""`ChatSession`: a conversation that can be continued, regenerated, edited, saved and resumed.

Knows messages and the `Runtime` that answers them; knows no terminal, no template and no token beyond counting them.
A reply that is interrupted keeps what was said; one that said nothing leaves the conversation as it was.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SessionError, UsageError
from ..generation.request import Result
from ..generation.stream import Dropped, Event, Finished, Prefilled, Started, Text
from . import history
from .settings import ReplySettings
from .turn import ReplyMeta, Turn

if TYPE_CHECKING:
    from ..runtime import Runtime, Stream
    from ..sampling.params import SamplingParams

__all__ = ["ChatSession", "ReplyMeta", "ReplySettings", "Turn"]
HALF = "\ufffd"
MAKING = "another reply of this chat is still being made"


class ChatSession:
    """One conversation with one model.

    `settings` may be replaced between replies. Every method that makes a reply exists twice: plain, returning the
    `Result`, and as `stream...`, yielding events, of which the last is `Finished`. Closing such a stream early, or an
    exception while it runs, keeps the text that was there.
    """

    def __init__(
        self,
        runtime: "Runtime",
        system: str | None = None,
        *,
        sampling: "SamplingParams | None" = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        overflow: str = "drop",
        settings: ReplySettings | None = None,
    ) -> None:
        """`settings` holds the four before it in one; give one or the other. Raises UsageError for bad values."""
        if settings is None:
            settings = ReplySettings(stop=tuple([stop] if isinstance(stop, str) else stop), overflow=overflow)
            settings = settings if sampling is None else replace(settings, sampling=sampling)
            settings = settings if max_tokens is None else replace(settings, max_tokens=max_tokens)
        self.runtime = runtime
        self.settings = settings
        self._system = _checked(system, "the system prompt") if system is not None else None
        self._turns: tuple[Turn, ...] = ()
        self._left = 0  # oldest turns that no longer fit the context; they are shown, but not sent
        self._cut_ids: tuple[int, ...] = ()  # tokens of the last reply, if it can be continued exactly
        self._making = False
        self._stream: Stream | None = None  # of the reply that is being made
        self._stop_asked = False

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All messages of both sides, oldest first."""
        return self._turns

    @property
    def system(self) -> str | None:
        """The system prompt; setting it keeps the conversation."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._check_idle()
        self._system = None if text is None else _checked(text, "the system prompt")
        self._left = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation as chat templates want it, system prompt first."""
        return self._messages(self._turns)

    @property
    def seen_messages(self) -> list[dict[str, str]]:
        """The part of `messages` that still fits the context: what the model sees."""
        return self._messages(self._turns[self._left :])

    @property
    def forgotten(self) -> tuple[Turn, ...]:
        """The oldest turns that left the context: the model no longer sees them."""
        return self._turns[: self._left]

    @property
    def making(self) -> bool:
        """True while a reply is being made."""
        return self._making

    def send(self, text: str) -> Result:
        """Say something and return the reply."""
        return _last(self.stream(text))

    def stream(self, text: str) -> Iterator[Event]:
        """Say something; the events of the reply."""
        return self._reply((*self._turns, Turn("user", _checked(text, "a message"))))

    def regenerate(self) -> Result:
        """Throw the last reply away and make another. Raises UsageError when nothing was said yet."""
        return _last(self.stream_regenerate())

    def stream_regenerate(self) -> Iterator[Event]:
        """Like `regenerate`, as events."""
        return self._reply(self._turns[: self._user_turn(-1) + 1])

    def edit(self, index: int, text: str) -> Result:
        """Replace what the user said at `index` (0 is the first message of the user, -1 the last) and reply to it.

        Everything after it is removed. Raises UsageError when there is no such message.
        """
        return _last(self.stream_edit(index, text))

    def stream_edit(self, index: int, text: str) -> Iterator[Event]:
        """Like `edit`, as events."""
        kept = self._turns[: self._user_turn(index)]
        return self._reply((*kept, Turn("user", _checked(text, "a message"))), left=0)

    def extend(self) -> Result:
        """Let the model go on with its last reply, for example after `max_tokens` or an interruption."""
        return _last(self.stream_extend())

    def stream_extend(self) -> Iterator[Event]:
        """Like `extend`, as events. The reply keeps its place; its text grows."""
        if not self._turns or self._turns[-1].role != "assistant":
            raise UsageError("there is no reply to continue", hint="say something first")
        return self._reply(self._turns[:-1], extended=self._turns[-1])

    def cancel(self) -> None:
        """End the running reply; `Finished` follows and what was said is kept. Safe in a signal handler."""
        self._stop_asked = True
        if self._stream is not None:
            self._stream.cancel()

    def undo(self) -> Turn:
        """Take the last message of the user and the reply to it back; returns the message."""
        self._check_idle()
        index = self._user_turn(-1)
        taken = self._turns[index]
        self._turns, self._left, self._cut_ids = self._turns[:index], 0, ()
        return taken

    def clear(self) -> None:
        """Forget the conversation; system prompt and settings stay."""
        self._check_idle()
        self._turns, self._left, self._cut_ids = (), 0, ()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the conversation to a JSON file, all or nothing. Raises SessionError."""
        transcript = history.Transcript(
            turns=self._turns,
            system=self._system,
            model=self.runtime.info.name,
            settings=self.settings.to_json(),
        )
        history.write(Path(path), transcript)

    @classmethod
    def load(cls, path: str | PathLike[str], runtime: "Runtime") -> "ChatSession":
        """The conversation of a file, to go on with on any model. Raises SessionError for damaged files."""
        transcript = history.read(Path(path))
        try:
            settings = ReplySettings.from_json(transcript.settings)
        except (UsageError, TypeError) as err:
            raise SessionError(f"{path} has settings this version does not take: {err}") from err
        session = cls(runtime, transcript.system, settings=settings)
        session._turns = transcript.turns
        return session

    def _reply(
        self, turns: tuple[Turn, ...], *, extended: Turn | None = None, left: int | None = None
    ) -> Iterator[Event]:
        """Checks now, runs when iterated: a stream that is never started changes nothing."""
        self._check_idle()
        self._stop_asked = False
        return self._run(turns, extended, self._left if left is None else left, self._turns)

    def _run(
        self, turns: tuple[Turn, ...], extended: Turn | None, left: int, since: tuple[Turn, ...]
    ) -> Iterator[Event]:
        self._check_idle()
        if self._turns is not since:
            raise UsageError("the conversation went on since this stream was made", hint="make a new one")
        before = (self._turns, self._left, self._cut_ids)
        self._left = left
        known = self._known_ids(extended)
        prompt = self._messages(turns[self._left :]) if extended is None else self._prefix(turns) + list(known)
        collected = _Collected()
        self._making = True
        try:
            self._stream = self.runtime.stream(
                prompt,
                max_tokens=self.settings.max_tokens,
                sampling=self.settings.sampling,
                stop=self.settings.stop,
                overflow=self.settings.overflow,
            )
            with closing(self._stream):
                if self._stop_asked:  # while the prompt was prepared
                    self._stream.cancel()
                for event in self._stream:
                    collected.take(event)
                    if isinstance(event, Dropped):
                        self._left = _skip(turns, self._left, event.turns)
                    if not isinstance(event, Finished):
                        yield event
        finally:
            # However it ended: what was said stays, and if nothing was said nothing happened.
            self._making, self._stream = False, None
            result = collected.result()
            if result.text or (collected.complete and result.stop_reason not in ("cancelled", "deadline")):
                self._keep(turns, extended, known, result)
            else:
                self._turns, self._left, self._cut_ids = before
        yield Finished(collected.request_id, result)

    def _keep(self, turns: tuple[Turn, ...], extended: Turn | None, known: tuple[int, ...], result: Result) -> None:
        text, ids = result.text, result.ids
        if extended is not None:
            ids = (*known, *result.ids)
            # Together the tokens may say it differently than in two parts (a blank between words belongs to one).
            # A character cut in two shows as U+FFFD at the seam of each part, and as itself in the whole.
            whole = self.runtime.tokenizer.decode(ids)
            fits = whole.startswith(extended.content.rstrip(HALF)) and whole.endswith(text.lstrip(HALF))
            text = whole if fits else extended.content + text
        self._turns = (*turns, Turn("assistant", text, _meta(result)))
        self._cut_ids = ids if result.stop_reason in ("length", "cancelled", "deadline") else ()

    def _known_ids(self, extended: Turn | None) -> tuple[int, ...]:
        """Tokens of the reply to go on with: those that were generated, or the text encoded as mere text."""
        if extended is None:
            return ()
        return self._cut_ids or tuple(self.runtime.tokenizer.encode(extended.content, parse_special=False))

    def _prefix(self, turns: tuple[Turn, ...]) -> list[int]:
        return list(self.runtime.render(self._messages(turns[self._left :])).ids)

    def _messages(self, turns: tuple[Turn, ...]) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *(turn.message for turn in turns)]

    def _user_turn(self, index: int) -> int:
        places = [place for place, turn in enumerate(self._turns) if turn.role == "user"]
        if not places:
            raise UsageError("nothing was said yet")
        if isinstance(index, bool) or not isinstance(index, int) or not -len(places) <= index < len(places):
            raise UsageError(
                f"there is no message {index!r} of the user", hint=f"the conversation has 0 to {len(places) - 1}"
            )
        return places[index]

    def _check_idle(self) -> None:
        if self._making:
            raise UsageError(MAKING, hint="finish or close its stream first")


class _Collected:
    """The events of one reply so far, and the result they amount to if no more come."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.request_id = ""
        self.complete = False
        self._clock = clock
        self._began = clock()
        self._prefilled: float | None = None
        self._prompt = self._reused = self._dropped = self._dropped_turns = 0
        self._text: list[str] = []
        self._ids: list[int] = []
        self._result: Result | None = None

    def take(self, event: Event) -> None:
        self.request_id = event.request_id
        if isinstance(event, Started):
            self._prompt, self._reused, self._began = event.prompt_tokens, event.reused_tokens, self._clock()
        elif isinstance(event, Prefilled):
            self._prefilled = event.seconds
        elif isinstance(event, Text):
            self._text.append(event.text)
            self._ids += event.ids
        elif isinstance(event, Dropped):
            self._dropped += event.tokens
            self._dropped_turns += event.turns
        elif isinstance(event, Finished):
            self._result, self.complete = event.result, True

    def result(self) -> Result:
        if self._result is not None:
            return self._result
        seconds = self._clock() - self._began
        prefill = seconds if self._prefilled is None else self._prefilled
        return Result(
            text="".join(self._text),
            ids=tuple(self._ids),
            stop_reason="cancelled",
            prompt_tokens=self._prompt,
            reused_tokens=self._reused,
            generated_tokens=len(self._ids),
            seconds_prefill=prefill,
            seconds_decode=max(0.0, seconds - prefill),
            dropped_tokens=self._dropped,
            dropped_turns=self._dropped_turns,
        )


def _skip(turns: tuple[Turn, ...], start: int, count: int) -> int:
    """The place after `count` messages of the user, with the replies to them, from `start` on; never past the last."""
    users = [place for place in range(start, len(turns)) if turns[place].role == "user"]
    return users[min(count, len(users) - 1)]


def _meta(result: Result) -> ReplyMeta:
    return ReplyMeta(
        stop_reason=result.stop_reason,
        prompt_tokens=result.prompt_tokens,
        reused_tokens=result.reused_tokens,
        generated_tokens=result.generated_tokens,
        seconds_prefill=result.seconds_prefill,
        seconds_decode=result.seconds_decode,
        dropped_tokens=result.dropped_tokens,
        dropped_turns=result.dropped_turns,
    )


def _last(events: Iterator[Event]) -> Result:
    for event in events:
        if isinstance(event, Finished):
            return event.result
    raise RuntimeError("a stream of events ended without Finished")


def _checked(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise UsageError(f"{what} must be text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise UsageError(f"{what} holds half a character (a lone surrogate)") from err
    return text
