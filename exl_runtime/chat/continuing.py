"""A reply that goes on: its prompt as token ids, and which whole turns leave when that does not fit the context.

The tokens of the reply so far stand behind the rendered conversation, so the runtime cannot see turns in it any more.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..cache.window import prompt_limit, turns_to_drop
from ..generation.request import Left
from ..generation.stream import Dropped, Event, Finished
from ..tokenizer.past import NOTHING, past_of
from .settings import ReplySettings

if TYPE_CHECKING:
    from ..runtime import Runtime


@dataclass(frozen=True, slots=True)
class Continuation:
    """`ids` to go on behind; `turns` of the oldest, `tokens` in all, are not among them. `left`, `keep`: as in a
    `Request`."""

    ids: tuple[int, ...]
    turns: int = 0
    tokens: int = 0
    left: Left | None = None
    keep: int = 0

    def told(self, events: Iterable[Event]) -> Iterator[Event]:
        """`events` of the reply, with what left told as the runtime tells it."""
        said = not self.turns
        for event in events:
            if not said:
                yield Dropped(event.request_id, self.tokens, self.turns)
                said = True
            if isinstance(event, Finished) and self.turns:
                gone = event.result.dropped_tokens + self.tokens
                event = replace(event, result=replace(event.result, dropped_tokens=gone, dropped_turns=self.turns))
            yield event


def continuation(
    runtime: "Runtime",
    messages: Sequence[dict[str, str]],
    known: Sequence[int],
    settings: ReplySettings,
    past: bytes = NOTHING,
) -> Continuation:
    """The prompt for going on behind `known`, the tokens of the reply to the last of `messages`, before which `past`
    left.

    With overflow "drop" the oldest whole turns leave, as they do for a new message; the system prompt and the turn
    that is answered stay. Where that is not enough, and with other policies, the generator decides by tokens.
    """
    starts = [place for place, message in enumerate(messages) if message["role"] == "user"]
    rendered: dict[int, tuple[int, ...]] = {}

    def without(turns: int) -> tuple[int, ...]:
        if turns not in rendered:
            rendered[turns] = tuple(runtime.render([*messages[: starts[0]], *messages[starts[turns] :]]).ids)
        return (*rendered[turns], *known)

    if settings.overflow == "window":
        return Continuation(without(0), keep=runtime.head(messages, without(0)))
    turns: int | None = 0
    if settings.overflow == "drop":
        limit = prompt_limit(runtime.info.context, settings.max_tokens)
        turns = turns_to_drop(lambda count: len(without(count)), len(starts) - 1, limit=limit)
    turns = len(starts) - 1 if turns is None else turns
    ids = without(turns)
    left = Left(past=past) if past else None
    if turns:
        gone = messages[starts[0] : starts[turns]]
        left = Left(past=past_of(gone, past), whole=without(0), before=past)
    return Continuation(ids, turns, len(without(0)) - len(ids), left)
