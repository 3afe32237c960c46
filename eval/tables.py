"""Tables as text for terminals and logs, and as HTML. Knows nothing of what stands in them.

Cells may hold names out of files: text output shows control characters as visible escapes, HTML output is escaped.
"""

import html
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exl_runtime.console.progress import printable

NONE = "-"  # what was not measured
GAP = 2  # spaces between two columns
NARROWEST = 12  # columns of a shortened cell


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and whether its cells are set like numbers."""

    title: str
    right: bool = False


def left(title: str) -> Column:
    """A column of words."""
    return Column(title)


def right(title: str) -> Column:
    """A column of numbers."""
    return Column(title, right=True)


class Table:
    """Rows of strings under headings. Raises ValueError for a row of another length than the headings."""

    def __init__(self, columns: Sequence[Column], rows: Iterable[Sequence[str]] = (), *, caption: str = "") -> None:
        self.columns = tuple(columns)
        self.caption = caption
        self.rows: list[tuple[str, ...]] = []
        for row in rows:
            self.add(*row)

    def add(self, *cells: str) -> None:
        """One more row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(tuple(cells))

    def text(self, width: int | None = None) -> str:
        """Lines without trailing spaces and without a final newline.

        width  columns there are; None: those of the terminal, or as many as it takes where output goes elsewhere
        A table that is too wide becomes several below each other, each with the first column; only words are shortened.
        """
        width = _terminal_width() if width is None else width
        titles = [column.title for column in self.columns]
        cells = [[printable(cell) for cell in row] for row in (titles, *self.rows)]
        longest = max(NARROWEST, width // 3) if width else None
        columns = [
            _set_column([row[i] for row in cells], column.right, None if column.right else longest)
            for i, column in enumerate(self.columns)
        ]
        blocks = [_lines(block) for block in _blocks(columns, width)]
        return "\n\n".join(([printable(self.caption)] if self.caption else []) + ["\n".join(lines) for lines in blocks])

    def html(self) -> str:
        """A `table` element; number cells have class "n"."""
        parts = ["<table>"]
        if self.caption:
            parts.append(f"<caption>{escape(self.caption)}</caption>")
        head = "".join(f'<th scope="col"{_kind(column)}>{escape(column.title)}</th>' for column in self.columns)
        parts.append(f"<thead><tr>{head}</tr></thead>\n<tbody>")
        for row in self.rows:
            cells = (f"<td{_kind(column)}>{escape(cell)}</td>" for column, cell in zip(self.columns, row, strict=True))
            parts.append(f"<tr>{''.join(cells)}</tr>")
        return "\n".join([*parts, "</tbody></table>"])


def escape(text: str, limit: int = 400) -> str:
    """One line of text for HTML, inside elements and inside quoted attributes."""
    return html.escape(printable(text, limit), quote=True)


def number(value: float | None, spec: str) -> str:
    """`value` in the format `spec`; "-" for None and for what is no finite number."""
    return NONE if value is None or not math.isfinite(value) else format(value, spec)


def _kind(column: Column) -> str:
    return ' class="n"' if column.right else ""


def _terminal_width() -> int:
    """0: no limit."""
    try:
        return shutil.get_terminal_size((0, 0)).columns if sys.stdout.isatty() else 0
    except (AttributeError, ValueError):  # no standard output at all; closed
        return 0


def _set_column(cells: Sequence[str], to_right: bool, longest: int | None) -> list[str]:
    """All cells of one column at the same width, counted in places of a terminal."""
    from rich.cells import cell_len

    shown = [cell if longest is None else _shortened(cell, longest) for cell in cells]
    width = max(map(cell_len, shown))
    return [
        " " * (width - cell_len(cell)) + cell if to_right else cell + " " * (width - cell_len(cell)) for cell in shown
    ]


def _shortened(text: str, width: int) -> str:
    """Names differ at their ends as often as at their beginnings: what goes is the middle."""
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    head, tail = text[: (width - 1) // 2], text[-(width // 2) :]
    while cell_len(head) + 1 + cell_len(tail) > width:  # of characters two places wide
        head, tail = (head[:-1], tail) if cell_len(head) >= cell_len(tail) else (head, tail[1:])
    return f"{head}…{tail}"


def _blocks(columns: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """The columns in groups that fit `width`, the first column in each."""
    from rich.cells import cell_len

    if not columns:
        return []
    first, rest = columns[0], columns[1:]
    blocks, used = [[first]], cell_len(first[0])
    for column in rest:
        needed = GAP + cell_len(column[0])
        if width and used + needed > width and len(blocks[-1]) > 1:
            blocks.append([first])
            used = cell_len(first[0])
        blocks[-1].append(column)
        used += needed
    return blocks


def _lines(block: Sequence[list[str]]) -> list[str]:
    lines = [(" " * GAP).join(cells).rstrip() for cells in zip(*block, strict=True)]
    from rich.cells import cell_len

    rule = "─" * max(cell_len(line) for line in lines)
    return [lines[0], rule, *lines[1:]]
