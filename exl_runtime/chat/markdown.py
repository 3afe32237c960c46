"""Markdown source -> lines of styled terminal text. Knows rich; knows nothing of streaming, cursors or conversations.

The last step before the terminal filters every piece of text again: Markdown itself can spell control characters
(`<http://a/%1b[31m>` decodes to a raw escape), so cleaning the source is not enough.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.segment import Segment, Segments
from rich.text import Text

from ..console.terminal import clean


class _LeftHeading(Heading):
    """Headings of a chat reply stand at the left, all of them: a centred one jumps while it is being written."""

    def __rich_console__(self, console: Console, options: object) -> Iterable[Text]:
        text = self.text.copy()
        text.justify = "left"
        yield text


class ReplyMarkdown(Markdown):
    """Markdown as models write it: HTML is text (tags must not vanish), and a line break is a line break."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "heading_open": _LeftHeading}

    def __init__(self, source: str) -> None:
        super().__init__("", code_theme="monokai", hyperlinks=False)
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self.markup = source
        self.parsed = parser.parse(source)
        for token in self.parsed:
            _keep_breaks(token)


def _keep_breaks(token: Token) -> None:
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"
        _keep_breaks(child)


def render_lines(source: str, console: Console, width: int) -> list[str]:
    """Lines of at most `width` cells, with their colour codes, without newlines and without trailing blanks."""
    try:
        rows = _rows(ReplyMarkdown(clean(source)), console, width)
    except Exception:  # third-party parsers and lexers, fed by a model: a reply must survive whatever they trip over
        rows = []
    if not any(segment.text.strip() for row in rows for segment in row):  # too deep, or a definition: show the source
        rows = _rows(Text(clean(source)), console, width)
    return _lines(rows, console)


def plain_lines(text: str, console: Console, width: int, *, style: str) -> list[str]:
    """The same for text that is no Markdown, in one style."""
    return _lines(_rows(Text(clean(text), style=style), console, width), console)


def _lines(rows: list[list[Segment]], console: Console) -> list[str]:
    with console.capture() as capture:
        console.print(Segments(_safe(rows)), end="", crop=False)
    lines = capture.get().split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)  # lists and tables bring a blank line of their own
    return lines


def _rows(renderable: Markdown | Text, console: Console, width: int) -> list[list[Segment]]:
    options = console.options.update(width=width, height=None)
    return console.render_lines(renderable, options, pad=False)


def _safe(rows: list[list[Segment]]) -> Iterator[Segment]:
    for row in rows:
        segments = [Segment(_one_line(segment.text), segment.style) for segment in row if not segment.control]
        while segments and not segments[-1].text.strip() and not _paints_background(segments[-1]):
            segments.pop()  # blanks nobody sees would make a copied reply ragged
        if segments and not _paints_background(segments[-1]):
            segments[-1] = Segment(segments[-1].text.rstrip(), segments[-1].style)
        yield from segments
        yield Segment.line()


def _one_line(text: str) -> str:
    return clean(text).replace("\n", " ").replace("\t", " ")


def _paints_background(segment: Segment) -> bool:
    return segment.style is not None and segment.style.bgcolor is not None


def visible_width(line: str) -> int:
    """Terminal cells of a rendered line: colour codes take none, wide characters two."""
    return cell_len(Text.from_ansi(line).plain)
