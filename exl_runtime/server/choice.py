"""One reply on its way to the client: thoughts and calls of tools are taken out of the text. Knows no protocol."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..tokenizer.reasoning import Eraser, Marks, ReasoningSplitter, begins_inside, marks_of, others_of
from ..tokenizer.tool_calls import Schemas, Syntax, ToolCall, ToolCallParser, syntaxes_of

Delta: TypeAlias = "tuple[Literal['reasoning', 'content'], str] | ToolCall"


@dataclass(frozen=True, slots=True)
class Form:
    """How to read the replies of one request.

    marks   None: thoughts stay in the text; `inside`: the reply begins with thoughts
    schemas what the model may call; empty: calls stay in the text
    hidden  special tokens to leave out of the text; empty when the runtime does so already
    """

    marks: Marks | None
    inside: bool
    syntaxes: tuple[Syntax, ...]
    schemas: Schemas
    one_call: bool
    hidden: frozenset[str]

    @classmethod
    def of(
        cls, runtime: Any, prompt: str, *, schemas: Schemas, split: bool, one_call: bool, constrained: bool
    ) -> "Form":
        """From the model's template and the rendered prompt. A constrained reply has no thoughts in front."""
        sources = runtime.template.sources
        marks = marks_of(sources) if split and not constrained else None
        syntaxes = syntaxes_of(sources) if schemas else ()
        inside = marks is not None and begins_inside(prompt, marks)
        wanted = {mark for syntax in syntaxes for mark in syntax.marks}
        wanted |= {marks.opening, marks.closing} if marks is not None else set()
        # Marks that are special tokens only show if all special tokens do; the others are then removed here.
        return cls(marks, inside, syntaxes, schemas, one_call, others_of(runtime.tokenizer, wanted))

    @property
    def skip_special(self) -> bool:
        """Whether the runtime shall leave special tokens out of the text."""
        return not self.hidden


class Choice:
    """Push the text of one reply as it comes; take what it means out."""

    def __init__(self, form: Form) -> None:
        self._hide = Eraser(form.hidden) if form.hidden else None
        self._splitter = ReasoningSplitter(form.marks, inside=form.inside) if form.marks is not None else None
        self._parser = ToolCallParser(form.syntaxes, form.schemas) if form.schemas else None
        self._one_call = form.one_call
        self.calls = 0

    @property
    def thinking(self) -> bool:
        """Whether the reply is amid thoughts."""
        return self._splitter is not None and self._splitter.thinking

    def push(self, text: str) -> list[Delta]:
        """What is certain now."""
        return list(self._read(text if self._hide is None else self._hide.push(text)))

    def finish(self) -> list[Delta]:
        """No more text comes."""
        found = list(self._read(self._hide.finish())) if self._hide is not None else []
        if self._splitter is not None:
            for kind, text in self._splitter.finish():
                found += self._content(text) if kind == "content" else [(kind, text)]
        if self._parser is not None:
            found += self._counted(self._parser.finish())
        return found

    def _read(self, text: str) -> Iterator[Delta]:
        if self._splitter is None:
            yield from self._content(text)
            return
        for kind, part in self._splitter.push(text):
            if kind == "reasoning":
                yield kind, part
            else:
                yield from self._content(part)

    def _content(self, text: str) -> list[Delta]:
        if self._parser is None:
            return [("content", text)] if text else []
        return self._counted(self._parser.push(text))

    def _counted(self, pieces: "Iterable[str | ToolCall]") -> list[Delta]:
        found: list[Delta] = []
        for piece in pieces:
            if isinstance(piece, str):
                found.append(("content", piece))
            elif not (self._one_call and self.calls):
                self.calls += 1
                found.append(piece)
        return found
