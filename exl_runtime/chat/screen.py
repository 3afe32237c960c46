"""Where the chat writes: a styled terminal, or plain streams. Knows text and tables; knows nothing of models.

Replies belong to standard output. Everything around them (start line, notices, status) goes to the same terminal when
it is styled, and to standard error when it is plain, so that redirected output holds the conversation only.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from ..console.terminal import Terminal, clean, clean_message, visible
from .reply import PlainReply, Reply, StyledReply

THEME = Theme(
    {
        "markdown.code": "bold cyan",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold",
        "markdown.h3": "bold italic",
        "notice": "dim",
        "warning": "yellow",
        "error": "red",
        "name": "bold",
    }
)


class Screen(Protocol):
    """What the conversation needs from a terminal."""

    def reply(self) -> Reply: ...
    def notice(self, text: str) -> None: ...
    def warning(self, text: str) -> None: ...
    def error(self, text: str) -> None: ...
    def show(self, text: str) -> None: ...
    def verbatim(self, text: str) -> None: ...
    def table(self, rows: Sequence[Sequence[str]], title: str = "") -> None: ...
    def copy(self, text: str) -> bool: ...


class PlainScreen:
    """Text only: replies to `out`, the rest to `err`."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr

    def reply(self) -> Reply:
        """A new reply on `out`; unfiltered where no terminal reads it."""
        return PlainReply(self._out, filtered=self._out.isatty())

    def notice(self, text: str) -> None:
        """Something worth knowing."""
        self._line(text)

    def warning(self, text: str) -> None:
        """Something that needs attention."""
        self._line(f"warning: {text}")

    def error(self, text: str) -> None:
        """Something that went wrong."""
        self._line(f"error: {text}")

    def show(self, text: str) -> None:
        """Text that was asked for."""
        self._line(text)

    def verbatim(self, text: str) -> None:
        """Text that was asked for, of any length, control characters made visible."""
        self._err.write(visible(text) + "\n")
        self._err.flush()

    def table(self, rows: Sequence[Sequence[str]], title: str = "") -> None:
        """Aligned columns."""
        if title:
            self._line(title)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [clean(cell).ljust(width) for cell, width in zip(row, widths, strict=True)]
            self._line("  " + "  ".join(cells).rstrip())

    def copy(self, text: str) -> bool:
        """A plain stream reaches no clipboard."""
        return False

    def _line(self, text: str) -> None:
        self._err.write(clean_message(text) + "\n")
        self._err.flush()


class StyledScreen:
    """A terminal with colours and a cursor."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(theme=THEME, highlight=False, markup=False, emoji=False)

    def reply(self) -> Reply:
        """A new reply, rendered as Markdown while it grows."""
        return StyledReply(self.console)

    def notice(self, text: str) -> None:
        """Something worth knowing, dim."""
        self._print(text, "notice")

    def warning(self, text: str) -> None:
        """Something that needs attention."""
        self._print(text, "warning")

    def error(self, text: str) -> None:
        """Something that went wrong."""
        self._print(text, "error")

    def show(self, text: str) -> None:
        """Text that was asked for."""
        self._print(text, "")

    def verbatim(self, text: str) -> None:
        """Text that was asked for, of any length; lines are broken by the terminal only."""
        self.console.print(Text(visible(text)), soft_wrap=True)

    def table(self, rows: Sequence[Sequence[str]], title: str = "") -> None:
        """Aligned columns; the first is the name."""
        if title:
            self._print(title, "name")
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
        for index in range(len(rows[0]) if rows else 0):
            table.add_column(style="name" if index == 0 else "notice" if index == 2 else "", overflow="fold")
        for row in rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        self.console.print(table)

    def copy(self, text: str) -> bool:
        """Hand `text` to the terminal's clipboard (OSC 52, which works over ssh). Whether it obeys is not known."""
        from base64 import b64encode

        with suppress(OSError):
            self.console.file.write(f"\x1b]52;c;{b64encode(text.encode('utf-8')).decode()}\x07")
            self.console.file.flush()
            return True
        return False

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(clean_message(text)), style=style, soft_wrap=False)


def make_screen(terminal: Terminal) -> PlainScreen | StyledScreen:
    """The screen that fits the terminal."""
    return StyledScreen() if terminal.styled else PlainScreen()
