"""One streamed reply on the screen. Takes text as it comes; knows nothing of models, tokens or commands.

`StyledReply` renders Markdown: finished blocks go to the scrollback, the block that still grows is redrawn. A block
taller than the screen shows its end while it grows and is written out whole when it is done; the finished lines of
a long code block are handed to the scrollback on the way.
"""

import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.text import Text

from ..console.terminal import clean
from .blocks import BlockSplitter
from .live import LiveRegion
from .markdown import plain_lines, render_lines

FRAME_SECONDS = 0.04
OPENING, CLOSING = "<think>\n", "\n</think>\n\n"
KEPT_CODE_LINES = 4  # complete lines of a long code block that stay live


class Reply(Protocol):
    """Where the text of one reply goes."""

    def waiting(self, note: str) -> None: ...
    def thought(self, piece: str) -> None: ...
    def text(self, piece: str) -> None: ...
    def finish(self) -> None: ...
    def discard(self) -> None: ...


class PlainReply:
    """Text as it is, for pipes and simple terminals; always ends a line. Thoughts stand between marks."""

    def __init__(self, out: TextIO, *, filtered: bool) -> None:
        self._out = out
        self._filtered = filtered
        self._last = ""
        self._thinking = False

    def waiting(self, note: str) -> None:
        """Nothing: a plain stream carries the reply only."""

    def thought(self, piece: str) -> None:
        """The same as `text`, for what comes before the answer."""
        opening = "" if self._thinking else OPENING
        self._thinking = True
        self._write(opening + piece)

    def text(self, piece: str) -> None:
        """Write and flush; `filtered` keeps control characters from a terminal."""
        self._end_thoughts()
        self._write(piece)

    def _end_thoughts(self) -> None:
        if self._thinking:
            self._thinking = False
            self._write(CLOSING)

    def _write(self, piece: str) -> None:
        piece = clean(piece) if self._filtered else piece
        if piece:
            self._out.write(piece)
            self._out.flush()
            self._last = piece[-1]

    def finish(self) -> None:
        """Close the last line."""
        if self._thinking:
            self._write(CLOSING.rstrip("\n"))
        if self._last != "\n":
            self._out.write("\n")
        self._out.flush()

    def discard(self) -> None:
        """There was no text: leave no trace."""


class StyledReply:
    """Markdown, live; thoughts before it are plain and dim."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._region = LiveRegion(console.file, lambda: console.size)
        self._splitter = BlockSplitter()
        self._clock = clock
        self._next_frame = 0.0
        self._done: list[str] = []  # finished blocks not on the screen yet
        self._given = 0  # lines of the growing code block that are in the scrollback already
        self._first = True
        self._thinking = False

    def waiting(self, note: str) -> None:
        """A dim line in place of the text that is not there yet."""
        if self._first:
            with self._console.capture() as capture:
                line = Text(" ".join(clean(note).split()), style="dim")
                self._console.print(line, width=self._region.width, no_wrap=True, overflow="ellipsis", end="")
            self._region.frame([], [capture.get()])

    def thought(self, piece: str) -> None:
        """Add to the thoughts."""
        self._switch(thinking=True)
        self._add(piece)

    def text(self, piece: str) -> None:
        """Add text; redraw if the last frame is old enough."""
        self._switch(thinking=False)
        self._add(piece)

    def _switch(self, *, thinking: bool) -> None:
        if thinking != self._thinking:
            self.finish()
            self._thinking, self._splitter = thinking, BlockSplitter()

    def _add(self, piece: str) -> None:
        self._done += self._splitter.push(piece)
        now = self._clock()
        if now >= self._next_frame:
            self._next_frame = now + FRAME_SECONDS
            self._draw()

    def finish(self) -> None:
        """Everything to the scrollback; the cursor ends in column 0 below."""
        self._done += self._splitter.finish()
        self._draw()

    def discard(self) -> None:
        """There was no text: take the waiting line away."""
        self._region.frame([], [])

    def _draw(self) -> None:
        finished: list[str] = []
        for block in self._done:
            finished += self._rest(self._render(block))
            self._given, self._first = 0, False
        self._done = []
        tail = self._splitter.tail
        live = self._render(tail) if tail.strip() else []
        code = self._splitter.fence is not None and not self._thinking
        if code and len(live) - self._given > self._region.height:
            finished += self._hand_over_code()
        self._region.frame(finished, self._rest(live) if live else [])

    def _render(self, block: str) -> list[str]:
        if self._thinking:
            return plain_lines(block, self._console, self._region.width, style="dim italic")
        return render_lines(block, self._console, self._region.width)

    def _rest(self, lines: list[str]) -> list[str]:
        """What of a block is not in the scrollback yet, behind the blank line that separates blocks."""
        if self._given:
            return lines[self._given :]
        return lines if self._first else ["", *lines]

    def _hand_over_code(self) -> list[str]:
        """Rendered lines of the growing code block that later text can change in colour only."""
        code = self._splitter.code_lines[:-KEPT_CODE_LINES]
        while code and not code[-1].strip():
            code.pop()  # rendering drops blank lines at the end of a block, so their number is not known yet
        opening = self._splitter.tail.split("\n", 1)[0]
        lines = self._render("\n".join([opening, *code]))[:-1] if code else []  # all but the lower margin
        if len(lines) <= self._given:
            return []
        new = self._rest(lines)
        self._given, self._first = len(lines), False
        return new
