"""Prompts that the session makes itself, as token ids: of a reply that goes on, and the one it is led away from.

The runtime cannot see turns in them any more, so which whole turns leave when they do not fit is decided here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..cache.window import prompt_limit, turns_to_drop
from ..generation.request import Left, Result
from ..generation.stream import Dropped, Event, Finished
from ..tokenizer.past import NOTHING, past_of
from .settings import ReplySettings
from .thinking import Voice
from .tree import Node
from .turn import CUT_SHORT

if TYPE_CHECKING:
    from ..runtime import Runtime
    from ..tokenizer.tokenizer import Tokenizer

HALF = "\ufffd"


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
    template_args: Mapping[str, Any] | None = None,
) -> Continuation:
    """The prompt for going on behind `known`, the tokens of the reply to the last of `messages`, before which `past`
    left.

    With overflow "drop" the oldest whole turns leave, as they do for a new message; the system prompt and the turn
    that is answered stay. Where that is not enough, and with other policies, the generator decides by tokens.
    `template_args` as `Runtime.render` takes them.
    """
    without, most = _shortened(runtime, messages, known, template_args)
    if settings.overflow == "window":
        return Continuation(without(0), keep=runtime.head(messages, without(0), template_args=template_args))
    turns: int | None = 0
    if settings.overflow == "drop":
        limit = prompt_limit(runtime.info.context, settings.max_tokens)
        turns = turns_to_drop(lambda count: len(without(count)), most, limit=limit)
    turns = most if turns is None else turns
    ids = without(turns)
    left = Left(past=past) if past else None
    if turns:
        starts = _starts(messages)
        left = Left(past=past_of(messages[starts[0] : starts[turns]], past), whole=without(0), before=past)
    return Continuation(ids, turns, len(without(0)) - len(ids), left)


def led_away(
    runtime: "Runtime",
    messages: Sequence[dict[str, str]],
    known: Sequence[int],
    settings: ReplySettings,
    template_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments of `Runtime.stream` for guidance; none where there is nothing to be led away from.

    The other prompt is the same conversation under another system prompt, or under none, followed by `known` as the
    prompt is. It takes room of its own: where reply and conversation do not fit, whole turns leave it, oldest first.
    """
    if settings.guidance == 1:
        return {}
    said = [message for message in messages if message["role"] != "system"]
    other = [{"role": "system", "content": settings.negative}] if settings.negative else []
    if [*other, *said] == list(messages):
        return {}
    without, most = _shortened(runtime, [*other, *said], known, template_args)
    limit = max(1, runtime.info.context - settings.max_tokens)
    turns = turns_to_drop(lambda count: len(without(count)), most, limit=limit)
    return {"guidance": settings.guidance, "negative_prompt": list(without(most if turns is None else turns))}


def _shortened(
    runtime: "Runtime",
    messages: Sequence[dict[str, str]],
    known: Sequence[int],
    template_args: Mapping[str, Any] | None,
) -> tuple[Callable[[int], tuple[int, ...]], int]:
    """The prompt as a function of how many of the oldest turns are left out of it; and the most that may be."""
    starts = _starts(messages)
    rendered: dict[int, tuple[int, ...]] = {}

    def without(turns: int) -> tuple[int, ...]:
        if turns not in rendered:
            kept = [*messages[: starts[0]], *messages[starts[turns] :]]
            rendered[turns] = tuple(runtime.render(kept, template_args=template_args).ids)
        return (*rendered[turns], *known)

    return without, len(starts) - 1


def _starts(messages: Sequence[dict[str, str]]) -> list[int]:
    """Where the turns begin."""
    return [place for place, message in enumerate(messages) if message["role"] == "user"]


def reply_ids(node: Node, voice: Voice, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """Tokens of a reply, without the one that ended it: as they were generated, or the text encoded as mere text."""
    ids = node.ids if node.ids and max(node.ids) < tokenizer.vocab_size else ()
    for end in (len(ids) - 1, len(ids)):
        if end > 0 and voice.spelled(ids[:end], tokenizer) == node.turn.content:
            return ids[:end]
    return tuple(tokenizer.encode(node.turn.content, parse_special=False))


def known_ids(node: Node, voice: Voice, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """Tokens of the reply to go on with. One that was cut short goes on amid a character, where it was cut there."""
    cut = node.turn.meta is None or node.turn.meta.stop_reason in CUT_SHORT
    ours = cut and node.ids and max(node.ids) < tokenizer.vocab_size  # a file may be from another model
    if ours and voice.spelled(node.ids, tokenizer).startswith(node.turn.content.rstrip(HALF)):
        return node.ids
    return reply_ids(node, voice, tokenizer)


def joined(
    node: Node, known: tuple[int, ...], result: Result, voice: Voice, tokenizer: "Tokenizer"
) -> tuple[str, tuple[int, ...]]:
    """Text and tokens of a reply and what was said behind it."""
    # Together the tokens may say it differently than in two parts (a blank between words belongs to one).
    # A character cut in two shows as U+FFFD at the seam of each part, and as itself in the whole.
    ids = (*known, *result.ids)
    whole, start = voice.spelled(ids, tokenizer), node.turn.content
    fits = whole.startswith(start.rstrip(HALF)) and whole.endswith(result.text.lstrip(HALF))
    return whole if fits else start + result.text, ids
