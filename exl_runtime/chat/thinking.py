"""What a model thinks before it answers, on the screen: all of it, folded into one line, or nothing of it.

The conversation keeps the whole text in any case; this is about what is shown.
"""

from typing import TYPE_CHECKING, Any, Literal

from ..errors import ExlError
from ..tokenizer.reasoning import ReasoningSplitter, begins_inside, marks_of

if TYPE_CHECKING:
    from .session import ChatSession

Mode = Literal["show", "fold", "hide"]
MODES: tuple[Mode, ...] = ("show", "fold", "hide")


class Thoughts:
    """Push the text of one reply as it comes; what is to be shown comes out."""

    def __init__(self, splitter: ReasoningSplitter | None) -> None:
        self._splitter = splitter
        self._thought = ""

    @property
    def thinking(self) -> bool:
        """Whether the reply is amid thoughts."""
        return self._splitter is not None and self._splitter.thinking

    @property
    def words(self) -> int:
        """Of the thoughts so far."""
        return len(self._thought.split())

    def push(self, text: str) -> str:
        """What of the reply itself is certain now."""
        return text if self._splitter is None else self._taken(self._splitter.push(text))

    def finish(self) -> str:
        """The last of it."""
        return "" if self._splitter is None else self._taken(self._splitter.finish())

    def _taken(self, parts: list[Any]) -> str:
        self._thought += "".join(text for kind, text in parts if kind == "reasoning")
        return "".join(text for kind, text in parts if kind == "content")


def thoughts_of(session: "ChatSession", mode: Mode) -> Thoughts:
    """For the reply that comes next. Models whose template knows no thoughts are shown as they are."""
    template = getattr(session.runtime, "template", None)
    if mode == "show" or template is None:
        return Thoughts(None)
    marks = marks_of(template.sources)
    if not any(mark in source for source in template.sources.values() for mark in (marks.opening, marks.closing)):
        return Thoughts(None)
    try:
        prompt = session.runtime.render([{"role": "user", "content": "?"}]).text
    except ExlError:  # a template that wants more than that
        return Thoughts(None)
    return Thoughts(ReasoningSplitter(marks, inside=begins_inside(prompt, marks)))
