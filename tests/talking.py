"""A screen that remembers and an editor that types what it is given: a chat without a terminal."""

import typing

from exl_runtime.chat.reply import PlainReply


class Recorder:
    """A screen: `lines` holds (kind, text), `replies` what the model said."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.copied: list[str] = []
        self.text = ""

    def reply(self) -> PlainReply:
        return PlainReply(self, filtered=False)  # type: ignore[arg-type]

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def notice(self, text: str) -> None:
        self.lines.append(("notice", text))

    def warning(self, text: str) -> None:
        self.lines.append(("warning", text))

    def error(self, text: str) -> None:
        self.lines.append(("error", text))

    def show(self, text: str) -> None:
        self.lines.append(("show", text))

    def verbatim(self, text: str) -> None:
        self.lines.append(("verbatim", text))

    def table(self, rows: typing.Any, title: str = "") -> None:
        self.lines.append(("table", title + "\n" + "\n".join("  ".join(row) for row in rows)))

    def copy(self, text: str) -> bool:
        self.copied.append(text)
        return True

    def said(self, kind: str) -> str:
        return "\n".join(text for what, text in self.lines if what == kind)


class Typist:
    """An editor that types what it is given."""

    drafts = True

    def __init__(self, *lines: typing.Any) -> None:
        self.lines = list(lines)
        self.offered: list[str] = []

    def read(self, draft: str = "") -> str:
        self.offered.append(draft)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line

    def type_ahead(self, keys: bytes) -> None:
        raise AssertionError("nobody types here")
