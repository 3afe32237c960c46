"""What a model thinks before it answers, told apart from the answer. Text only: no terminal, no tokens."""

from typing import TYPE_CHECKING

from ..tokenizer.reasoning import ReasoningSplitter, begins_inside, marks_of

if TYPE_CHECKING:
    from ..runtime import Runtime

QUESTION = [{"role": "user", "content": "?"}]  # any message: what a template writes before a reply is the same


def splitter_for(runtime: "Runtime", before: str = "") -> ReasoningSplitter | None:
    """For the text of one reply, or for what comes behind `before` of it. None: the model has no template."""
    template = getattr(runtime, "template", None)
    if template is None:
        return None
    marks = marks_of(template.sources)
    opened = any(marks.opening in source for source in template.sources.values())
    splitter = ReasoningSplitter(marks, inside=opened and begins_inside(runtime.render(QUESTION).text, marks))
    splitter.push(before)
    return splitter


def thoughts_of(runtime: "Runtime", reply: str) -> str:
    """The thoughts at the beginning of a whole reply; "" when there are none."""
    splitter = splitter_for(runtime)
    found = [] if splitter is None else [*splitter.push(reply), *splitter.finish()]
    return "".join(text for kind, text in found if kind == "reasoning")
