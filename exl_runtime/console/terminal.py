"""What text may do to a terminal, and what a terminal can do. Knows nothing of models or conversations.

Model output, model names and error messages can carry bytes from files nobody checked. Written raw, an escape
sequence in them could retitle the window, move the cursor or fill the clipboard; so everything passes `clean` or
`clean_line` on its way to a terminal.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

# C0 without tab and newline, DEL, C1, and the bidirectional overrides that can make text read other than it is.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no undecodable byte
_UNSAFE_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """`text` without control characters, tabs and newlines kept. Looks at single characters, so any cut will do."""
    return _UNSAFE.sub("", text)


def clean_line(text: str, limit: int = 400) -> str:
    """One printable line: control characters become visible escapes such as \\x1b, long text is cut to `limit`."""
    shown = _UNSAFE_LINE.sub(_escape, text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def visible(text: str) -> str:
    """Text of any length and several lines: control characters other than newlines become visible escapes."""
    return "\n".join(_UNSAFE_LINE.sub(_escape, line) for line in text.split("\n"))


def clean_message(text: str, limit: int = 4000) -> str:
    """`visible`, cut to `limit`: for messages that may quote a file. A long line loses its middle, not its end."""
    shown = "\n".join(_shortened(line) for line in visible(text[: 2 * 2**20]).split("\n"))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _shortened(line: str, head: int = 500, tail: int = 200) -> str:
    return line if len(line) <= head + tail else f"{line[:head]} … {line[-tail:]}"


def user_text(text: str) -> str:
    """Text from argv or standard input: undecodable bytes become U+FFFD, so that it can be tokenized and saved."""
    return _HALVES.sub("\ufffd", text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _escape(match: re.Match[str]) -> str:
    return escaped(match.group())


def escaped(char: str) -> str:
    """A visible escape for one character, such as \\x1b."""
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """What the streams of this process can do.

    interactive  a person types at standard input
    styled       standard output takes escape sequences (colour, cursor movement)
    editor       a line editor that moves the cursor can run
    """

    interactive: bool
    styled: bool
    editor: bool

    @classmethod
    def detect(cls, *, plain: bool = False, no_color: bool = False) -> "Terminal":
        """Look at the standard streams, TERM and NO_COLOR (https://no-color.org: any non-empty value)."""
        stdin, stdout = is_tty(sys.stdin), is_tty(sys.stdout)
        dumb = os.environ.get("TERM", "") in ("", "dumb")
        colourless = no_color or bool(os.environ.get("NO_COLOR"))
        return cls(
            interactive=stdin,
            styled=stdin and stdout and not (plain or dumb or colourless),
            editor=stdin and stdout and not (plain or dumb),
        )


def is_tty(stream: TextIO | None) -> bool:
    """Whether a stream of this process is a terminal; a closed or missing one is not."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def tolerant_streams() -> None:
    """Never die of an encoding: what cannot be encoded is replaced, what cannot be decoded becomes a surrogate.

    A stream that was closed before the start (`<&-`) is None in Python. Input then ends at once, messages go nowhere,
    and output fails when it is written: nobody should take it for done. The number is filled too, lest a file opened
    later gets it.
    """
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, flags)
            mode = "w" if number else "r"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (for good)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def state_dir() -> Path:
    """The folder for what persists between chats, by the XDG base directory specification."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "exl-runtime"
