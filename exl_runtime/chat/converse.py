"""One exchange on a screen: the events of a reply become text, notices and a status line. Knows no commands."""

import time
from collections.abc import Callable, Iterable, Iterator

from ..errors import ExlError
from ..generation.request import Result
from ..generation.stream import Dropped, Event, Finished, Started, Text
from . import status
from .interrupts import gentle_interrupt
from .reply import Reply
from .screen import Screen
from .session import ChatSession
from .thinking import Part, Voice
from .tree import Node

NOTE_SECONDS = 0.1  # between two notes of what is being thought
TAIL = 48  # characters of it that such a note shows


def show_reply(
    session: ChatSession, events: Iterator[Event], screen: Screen, begun: Node | None = None
) -> tuple[Result | None, bool]:
    """Run a reply to its end and say what it took. An ExlError is shown, not raised: the conversation goes on.
    begun: the reply that goes on.

    The result is None when there is none: it failed, or was stopped before a word. The flag says that Ctrl-C was used.
    """
    reply = screen.reply()
    result: Result | None = None
    problem: ExlError | None = None
    spoken = False
    forgotten = len(session.forgotten)
    dropped = 0
    shown = Shown(session, reply, begun)
    with gentle_interrupt(session.cancel) as interrupted:
        try:
            for event in events:
                if isinstance(event, Started):
                    reply.waiting(f"reading {status.count(event.prompt_tokens - event.reused_tokens)} tokens …")
                elif isinstance(event, Text):
                    spoken = spoken or bool(event.text)
                    shown.take(event)
                elif isinstance(event, Dropped):
                    dropped += event.tokens
                elif isinstance(event, Finished):
                    result = event.result
        except KeyboardInterrupt:  # the second one: no more waiting for the present step
            pass
        except ExlError as err:
            problem = err
    shown.finish()
    if shown.anything or (not spoken and result is not None and result.stop_reason not in ("cancelled", "deadline")):
        reply.finish()
    else:
        reply.discard()
    if dropped:
        screen.warning(status.dropped_notice(session.forgotten[forgotten:], dropped))
    if problem is not None:
        screen.error(str(problem))
    elif not spoken and (result is None or result.stop_reason in ("cancelled", "deadline")):
        screen.notice("stopped before the first word: the conversation is as it was before")
        result = None
    elif result is None:  # insisted: what was said is kept, its numbers are not known
        screen.notice("stopped; what was said is kept")
    else:
        context = session.runtime.info.context
        if note := shown.folded:
            screen.notice(note)
        screen.notice(status.status_line(result, context))
        if warning := status.fullness_warning(result, context, session.settings.overflow):
            screen.warning(warning)
    return result, interrupted()


class Shown:
    """What of a reply is on the screen: the answer, and its thoughts as the settings want them."""

    def __init__(
        self,
        session: ChatSession,
        reply: Reply,
        begun: Node | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reply = reply
        self._clock, self._next_note = clock, 0.0
        self._mode = session.settings.thoughts
        voice = session.voice if session.settings.grammar is None else Voice()
        self._reading = voice.reading(begun)
        self._before = self._reading.words
        self.anything = False

    @property
    def folded(self) -> str:
        """A line in place of the thoughts that were folded away; empty where there are none."""
        words = self._reading.words - self._before
        if not words or self._mode != "fold":
            return ""
        return f"thought for {status.count(words)} words, {status.count(self._reading.tokens)} tokens (/think shows it)"

    def take(self, event: Text) -> None:
        """Show the next piece."""
        self._show(self._reading.take(event))
        if self._reading.thinking and not self.anything and (now := self._clock()) >= self._next_note:
            self._next_note = now + NOTE_SECONDS  # long thoughts are not to be counted for every token
            last = " ".join(self._reading.thoughts[-TAIL:].split()) if self._mode == "fold" else ""
            count = f"thinking … {status.count(self._reading.words)} words"
            self._reply.waiting(f"{count} · …{last}" if last else count)

    def finish(self) -> None:
        """Show the rest."""
        self._show(self._reading.finish())

    def _show(self, parts: Iterable[Part]) -> None:
        for kind, text in parts:
            if kind == "content":
                self._reply.text(text)
            elif self._mode == "show":
                self._reply.thought(text)
            else:
                continue
            self.anything = True
