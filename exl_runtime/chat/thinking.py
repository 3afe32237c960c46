"""What a model thinks before it answers: found in its replies, kept apart from the answer, shown or not.

The conversation keeps the whole text with its marks, as it was written. The model is shown both parts apart, so that
its template decides what of old thoughts it sees again; people see what `thoughts` of the settings says.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ExlError
from ..generation.stream import Event, Finished, Text
from ..tokenizer.reasoning import Eraser, Marks, ReasoningSplitter, begins_inside, marks_of, others_of
from .tree import Node
from .turn import CUT_SHORT, Turn

if TYPE_CHECKING:
    from ..runtime import Runtime

Part = tuple[Literal["reasoning", "content"], str]


@dataclass(frozen=True, slots=True)
class Voice:
    """How the replies of one model are read.

    marks   around its thoughts; None: it has none
    inside  its prompts end with the opening mark, so that replies begin with thoughts
    hidden  special tokens to erase from its text; empty when the runtime leaves them all out
    """

    marks: Marks | None = None
    inside: bool = False
    hidden: frozenset[str] = frozenset()

    @classmethod
    def of(cls, runtime: "Runtime", template_args: Mapping[str, Any] | None = None) -> "Voice":
        """From the chat template, which spells the marks out, and from the special tokens, among which they may be.
        template_args: variables of the template, which may turn thoughts on or off."""
        template = getattr(runtime, "template", None)
        if template is None:
            return cls()
        marks = marks_of(template.sources)
        pair = (marks.opening, marks.closing)
        hidden = others_of(runtime.tokenizer, pair)
        if not hidden and not any(mark in source for source in template.sources.values() for mark in pair):
            return cls()
        try:
            more = {"template_args": template_args} if template_args else {}
            prompt = runtime.render([{"role": "user", "content": "?"}], **more).text
        except ExlError:  # a template that wants more than that
            return cls()
        return cls(marks, begins_inside(prompt, marks), hidden)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `Runtime.stream`."""
        return {"skip_special": False} if self.hidden else {}

    def reading(self, begun: Node | None = None) -> "Reading":
        """Of a reply that is about to come, or of one that goes on."""
        if begun is None or self.marks is None:
            return Reading(self.marks, inside=self.inside)
        broken_off = begun.turn.meta is None and bool(begun.ids)  # without an end: the program was killed
        reading = Reading(self.marks, inside=self._begins_inside(begun.turn, broken_off))
        reading.push(begun.turn.content)
        return reading

    def parts(self, turn: Turn) -> tuple[str, str]:
        """(thoughts, answer) of a turn that is over."""
        if self.marks is None or turn.role != "assistant":
            return "", turn.content
        splitter = ReasoningSplitter(self.marks, inside=self._begins_inside(turn))
        found = [*splitter.push(turn.content), *splitter.finish()]
        thoughts, answer = ("".join(part for kind, part in found if kind == wanted) for wanted in _KINDS)
        return thoughts, answer

    def _begins_inside(self, turn: Turn, broken_off: bool = False) -> bool:
        """Whether the text begins with thoughts whose opening mark stood in the prompt. One that never closed them is
        all thought if it was cut short; else somebody wrote it by hand."""
        assert self.marks is not None
        if turn.content.lstrip().startswith(self.marks.opening):
            return False
        cut = broken_off or (turn.meta is not None and turn.meta.stop_reason in CUT_SHORT)
        return self.marks.closing in turn.content or (self.inside and cut)

    def spelled(self, ids: Sequence[int], tokenizer: Any) -> str:
        """The text of tokens, as replies show it."""
        if not self.hidden:
            return tokenizer.decode(ids)
        return self._erased(tokenizer.decode(ids, skip_special=False))

    def heard(self, events: Iterable[Event]) -> Iterator[Event]:
        """Events of a stream that was made with `options`, without the special tokens that are no marks."""
        if not self.hidden:
            yield from events
            return
        eraser = Eraser(self.hidden)
        for event in events:
            if isinstance(event, Text):
                text = eraser.push(event.text)
                if text or event.ids:
                    yield replace(event, text=text)
            elif isinstance(event, Finished):
                if rest := eraser.finish():
                    yield Text(event.request_id, rest, (), None)
                yield replace(event, result=replace(event.result, text=self._erased(event.result.text)))
            else:
                yield event

    def _erased(self, text: str) -> str:
        eraser = Eraser(self.hidden)
        return eraser.push(text) + eraser.finish()


_KINDS = ("reasoning", "content")


class Reading:
    """One reply as it comes: its text in, thoughts and answer out. `thoughts` holds the former."""

    def __init__(self, marks: Marks | None, *, inside: bool) -> None:
        self._splitter = None if marks is None else ReasoningSplitter(marks, inside=inside)
        self.thoughts = ""
        self._before = 0  # tokens up to the answer
        self._answered = False

    @property
    def tokens(self) -> int:
        """Of the thoughts so far, marks included."""
        return self._before if self.thoughts else 0

    @property
    def thinking(self) -> bool:
        """Whether the reply is amid thoughts."""
        return self._splitter is not None and self._splitter.thinking

    @property
    def words(self) -> int:
        """Of the thoughts so far."""
        return len(self.thoughts.split())

    def take(self, event: Text) -> list[Part]:
        """What is certain now."""
        parts = self.push(event.text)
        self._answered = self._answered or any(kind == "content" for kind, _ in parts)
        self._before += 0 if self._answered else len(event.ids)
        return parts

    def push(self, text: str) -> list[Part]:
        """The same for text of which no tokens are known."""
        if self._splitter is None:
            return [("content", text)] if text else []
        return self._kept(self._splitter.push(text))

    def finish(self) -> list[Part]:
        """No more text comes."""
        return [] if self._splitter is None else self._kept(self._splitter.finish())

    def _kept(self, parts: list[Part]) -> list[Part]:
        self.thoughts += "".join(text for kind, text in parts if kind == "reasoning")
        return parts
