"""Cutting a growing Markdown text into blocks that are finished and one that still grows. Text only: no terminal.

A block is finished when nothing that may still come can change how it looks: then it is printed once and never again.
Lists keep together across blank lines, fences (CommonMark 0.31, section 4.5) are closed only by their own kind.
"""

import re
from dataclasses import dataclass

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,})(?P<info>[^\n]*)$")
_LIST_ITEM = re.compile(r"^ {0,3}(?:[-+*]|\d{1,9}[.)])(?:[ \t]|$)")
_RULE = re.compile(r"^ {0,3}(?:(?:-[ \t]*){3,}|(?:_[ \t]*){3,}|(?:\*[ \t]*){3,})$")
_HEADING = re.compile(r"^ {0,3}#{1,6}(?:[ \t]|$)")


@dataclass(frozen=True, slots=True)
class Fence:
    """An open code fence: its character, its length, its info string ("python")."""

    char: str
    length: int
    info: str

    @classmethod
    def opened_by(cls, line: str, *, nested: bool) -> "Fence | None":
        """The fence that `line` opens. In a list (`nested`) a fence may be indented by more than three columns."""
        match = _FENCE.match(line)
        if match is None or (not nested and len(match["indent"].expandtabs(4)) > 3):
            return None
        mark, info = match["mark"], match["info"].strip()
        if mark[0] == "`" and "`" in info:
            return None
        return cls(mark[0], len(mark), info)

    def closed_by(self, line: str) -> bool:
        """Whether `line` is nothing but at least as many of the same character."""
        mark = line.strip()
        return len(mark) >= self.length and set(mark) == {self.char}


class BlockSplitter:
    """Push text as it comes; take finished blocks out. `tail` is what may still change.

    Joining all finished blocks, the blank lines between them and the tail gives the text back.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []  # complete lines of the block that grows
        self._partial = ""  # the line without its newline yet
        self._fence: Fence | None = None
        self._is_list = False
        self._gap = False  # the block is followed by a blank line; the next line decides whether it ended

    @property
    def tail(self) -> str:
        """Markdown of the block that still grows, incomplete last line included."""
        return "\n".join([*self._lines, self._partial]).strip("\n")

    @property
    def fence(self) -> Fence | None:
        """The code fence that is open at the end, if the tail is a fenced block of its own (not one in a list)."""
        return None if self._is_list else self._fence

    @property
    def code_lines(self) -> list[str]:
        """The complete lines after the opening of `fence`."""
        return self._lines[1:] if self.fence is not None else []

    def push(self, text: str) -> list[str]:
        """Take the next piece of text; return the blocks that it finished, oldest first."""
        finished: list[str] = []
        *complete, self._partial = (self._partial + text).split("\n")
        for line in complete:
            finished += self._take(line)
        return finished

    def finish(self) -> list[str]:
        """No more text: everything that is left, as blocks."""
        finished = self._take(self._partial) if self._partial else []
        self._partial = ""
        return finished + self._cut()

    def _take(self, line: str) -> list[str]:
        if self._fence is not None:
            self._lines.append(line)
            if not self._fence.closed_by(line):
                return []
            self._fence = None
            return [] if self._is_list else self._cut()
        blank = not line.strip()
        if blank:
            self._gap = self._gap or bool(self._lines)
            if self._is_list or self._indented():
                self._lines.append("")  # inside a loose list or indented code the blank line belongs to the block
            return [] if self._is_list or self._indented() else self._cut()
        finished = self._cut() if self._ends_block(line) else []
        self._gap = False
        self._fence = Fence.opened_by(line, nested=self._is_list)
        self._is_list = self._is_list or self._is_item(line)  # a list may follow its introduction directly
        self._lines.append(line)
        if _HEADING.match(line) and not self._is_list:
            finished += self._cut()
        return finished

    def _indented(self) -> bool:
        return bool(self._lines) and self._lines[0].startswith(("    ", "\t"))

    def _ends_block(self, line: str) -> bool:
        """Whether the non-blank `line` starts a new block instead of continuing the current one."""
        if not self._lines:
            return False
        if self._is_list:
            return self._gap and not line.startswith((" ", "\t")) and not self._is_item(line)
        if self._gap:  # only indented code gets here: other blocks were cut at the blank line
            return not line.startswith(("    ", "\t"))
        return Fence.opened_by(line, nested=False) is not None or bool(_HEADING.match(line))

    @staticmethod
    def _is_item(line: str) -> bool:
        return bool(_LIST_ITEM.match(line)) and not _RULE.match(line)

    def _cut(self) -> list[str]:
        block = "\n".join(self._lines).strip("\n")
        self._lines, self._fence, self._is_list, self._gap = [], None, False, False
        return [block] if block.strip() else []


def code_blocks(text: str) -> list[str]:
    """The contents of the fenced code blocks of a reply, in order, an unclosed last one included."""
    found: list[str] = []
    fence: Fence | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        if fence is None:
            fence = Fence.opened_by(line, nested=True)
        elif fence.closed_by(line):
            found.append("\n".join(lines))
            fence, lines = None, []
        else:
            lines.append(line)
    return [*found, "\n".join(lines)] if fence is not None else found
