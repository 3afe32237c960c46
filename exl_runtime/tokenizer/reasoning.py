"""Separates what a model thinks (`<think>` ... `</think>`) from what it answers. Pure functions of text.

The result does not depend on the pieces in which the text arrives, and nothing of the text is lost but the marks
themselves and the blank space around them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Marks:
    """The texts between which a model thinks."""

    opening: str
    closing: str


KNOWN = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<thinking>", "</thinking>"),
)
Kind = Literal["reasoning", "content"]


def marks_of(templates: Mapping[str, str]) -> Marks:
    """The marks that a model's chat templates spell out; without any, the most common ones."""
    source = "\0".join(templates.values())
    return next((marks for marks in KNOWN if marks.opening in source or marks.closing in source), KNOWN[0])


def begins_inside(prompt: str, marks: Marks) -> bool:
    """Whether the prompt ends with the opening mark, so that the reply begins with thoughts."""
    return prompt.rstrip().endswith(marks.opening)


def partial_end(text: str, wanted: str) -> int:
    """Length of the longest end of `text` that is a beginning of `wanted`, but not all of it."""
    return next((n for n in range(min(len(wanted) - 1, len(text)), 0, -1) if text.endswith(wanted[:n])), 0)


class ReasoningSplitter:
    """One reply: push its text as it comes. Thoughts are only looked for at the beginning of a reply."""

    def __init__(self, marks: Marks, *, inside: bool) -> None:
        """`inside`: the reply begins with thoughts (see `begins_inside`)."""
        self._marks = marks
        self._state: Literal["start", "inside", "after", "content"] = "inside" if inside else "start"
        self._held = ""
        self._begun = False  # some thought was handed out: blank space is a part of them from now on

    @property
    def thinking(self) -> bool:
        """Whether the text pushed so far ends amid thoughts."""
        return self._state == "inside"

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """What is certain now; texts are never empty."""
        self._held += text
        found: list[tuple[Kind, str]] = []
        if self._state == "start":
            self._start(found)
        if self._state == "inside":
            self._inside(found)
        if self._state == "after":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "content"
        if self._state == "content" and self._held:
            found.append(("content", self._held))
            self._held = ""
        return found

    def finish(self) -> list[tuple[Kind, str]]:
        """No more text comes."""
        rest, self._held = self._held, ""
        if self._state == "inside":
            rest = rest.rstrip() if self._begun else rest.strip()
        kind: Kind = "reasoning" if self._state == "inside" else "content"
        return [(kind, rest)] if rest else []

    def _start(self, found: list[tuple[Kind, str]]) -> None:
        begin = self._held.lstrip()
        if begin.startswith(self._marks.opening):
            self._state = "inside"
            self._held = begin[len(self._marks.opening) :]
        elif not self._marks.opening.startswith(begin):
            self._state = "content"

    def _inside(self, found: list[tuple[Kind, str]]) -> None:
        thought, mark, rest = self._held.partition(self._marks.closing)
        if mark:
            thought = thought.rstrip()
            self._held = rest
            self._state = "after"
        else:
            keep = partial_end(thought, self._marks.closing)
            certain = thought[: len(thought) - keep].rstrip()
            self._held = thought[len(certain) :]
            thought = certain
        if not self._begun:
            thought = thought.lstrip()
        if thought:
            self._begun = True
            found.append(("reasoning", thought))


def others_of(tokenizer: "Tokenizer", wanted: Iterable[str]) -> frozenset[str]:
    """The special tokens that have to be erased from a text in which those of `wanted` shall show.

    Special tokens show all together or not at all. Empty when none of `wanted` is one: the text comes without any then.
    """
    special = {tokenizer.piece(token) for token in tokenizer.special_ids}
    seen = special & set(wanted)
    return frozenset(special - seen) if seen else frozenset()


class Eraser:
    """Text in, text out without certain words, whatever the pieces it comes in."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(word for word in words if word)
        self._first = frozenset(word[0] for word in self._words)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain now."""
        if not self._held and self._first.isdisjoint(text):
            return text  # there may be a thousand words, and they rarely come
        text = self._held + text
        for word in self._words:
            text = text.replace(word, "")
        keep = max((partial_end(text, word) for word in self._words), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was still held back."""
        rest, self._held = self._held, ""
        return rest
