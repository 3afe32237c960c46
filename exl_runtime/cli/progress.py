"""What a long start tells while it goes on: one line on standard error that is overwritten and then removed."""

import sys
import time
from types import TracebackType

from typing_extensions import Self

from ..console.terminal import clean_line

PATIENCE = 0.7  # seconds before the first sign of life: most starts are shorter


class Progress:
    """Call it with one line of text now and then. On a terminal the line replaces the last one; else it is silent,
    unless `quiet` is off.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._tty = sys.stderr.isatty()
        self._quiet = quiet
        self._started = time.monotonic()
        self._written = False

    def __call__(self, text: str) -> None:
        """Show `text`."""
        line = clean_line(text, 78)
        if not self._tty:
            if not self._quiet:
                sys.stderr.write(f"exl: {line}\n")
        elif time.monotonic() - self._started > PATIENCE:
            sys.stderr.write(f"\r\x1b[2K{line}")
            sys.stderr.flush()
            self._written = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, err: BaseException | None, trace: TracebackType | None) -> None:
        if self._written:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
