"""Tells a person at a terminal how a build goes. Knows nothing of builds but their messages."""

import sys
from typing import TextIO


class StandardError:
    """On a terminal one line that is rewritten; elsewhere a line now and then, so that logs stay short."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream is not None and self._stream.isatty()
        self._width = 0
        self._last = ""

    def __call__(self, message: str) -> None:
        """Show `message`; the text up to its first digit or colon is what it is about."""
        if self._stream is None:
            return
        if self._terminal:
            end = "\n" if message.startswith("native kernels are ready") else ""
            self._stream.write(f"\r{message:<{self._width}}{end}")
            self._width = 0 if end else len(message)
        else:
            about = message.split(":", 1)[0].split("(", 1)[0]
            if about == self._last:
                return
            self._last = about
            self._stream.write(f"{message}\n")
        self._stream.flush()
