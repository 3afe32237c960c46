"""The part of the terminal that is still being written: redrawn in place, line by line, without flicker.

Knows lines of styled text and a cursor; knows nothing of Markdown. Finished lines are written once and belong to the
scrollback from then on. A frame rewrites only the lines that changed and goes out in a single write.
"""

from collections.abc import Callable, Sequence
from typing import TextIO

from .markdown import visible_width

# Terminals that know the synchronized-output mode show a frame at once; the others ignore both sequences.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
_ERASE_LINE, _ERASE_BELOW = "\x1b[2K", "\x1b[J"


class LiveRegion:
    """Some lines at the bottom of the output that may still change.

    Between frames the cursor stands at the end of the last live line, or in column 0 of an empty line if there is
    none. Every line must be narrower than the terminal: a full last column leaves terminals in different states.
    """

    def __init__(self, out: TextIO, size: Callable[[], tuple[int, int]]) -> None:
        self._out = out
        self._size = size  # () -> (columns, rows)
        self._shown: list[str] = [""]
        self._columns = size()[0]

    @property
    def width(self) -> int:
        """Cells a line may take."""
        return max(10, self._size()[0] - 1)

    @property
    def height(self) -> int:
        """Lines that may be live at once: what has scrolled off the screen can not be redrawn."""
        return max(3, self._size()[1] - 2)

    def frame(self, finished: Sequence[str], live: Sequence[str]) -> None:
        """Turn the live lines into `finished` (for good) followed by `live`, of which the last `height` are shown."""
        old, new = self._shown, [*finished, *(live[-self.height :] or [""])]
        if old == new and not finished:
            return
        first = min(_common(old, new), len(new) - 1)
        parts = [_BEGIN]
        last_row = len(old) - 1
        if first > last_row:
            parts.append("\n")
        else:
            up = self._rows_between(old[first:])
            parts.append(f"\r\x1b[{up}A" if up else "\r")
        parts.append("\n".join(_ERASE_LINE + line for line in new[first:]))
        if len(old) > len(new) or self._columns != self._size()[0]:
            parts.append(_ERASE_BELOW)
        parts.append(_END)
        self._shown = new[len(finished) :]
        self._columns = self._size()[0]
        self._out.write("".join(parts))
        self._out.flush()

    def _rows_between(self, lines: Sequence[str]) -> int:
        """Screen rows from the first of `lines` to the cursor; a terminal made narrower since has wrapped them."""
        columns = self._size()[0]
        if columns >= self._columns:
            return len(lines) - 1
        return sum(max(1, -(-visible_width(line) // columns)) for line in lines) - 1


def _common(old: Sequence[str], new: Sequence[str]) -> int:
    count = 0
    for a, b in zip(old, new, strict=False):
        if a != b:
            break
        count += 1
    return count
