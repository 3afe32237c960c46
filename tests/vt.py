"""A small terminal: enough of ECMA-48 to see what a person would see. Used to test what the chat draws."""

import re

from wcwidth import wcwidth

_TOKEN = re.compile(r"\x1b\[([?>]?)([\d;]*) ?([A-Za-z])|\x1b\]([^\x07\x1b]*)(?:\x07|\x1b\\)|\x1b(\(?.)|([\s\S])")
_CUT = re.compile(r"\x1b(?:\[[?>\d; ]*|\][^\x07]*|\()?\Z")  # a sequence whose end has not come yet


class Terminal:
    """`feed` bytes or text; `rows` is the screen, `scrollback` what left it at the top; `everything` both."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self.columns, self.lines = columns, lines
        self.grid: list[list[str]] = [[" "] * columns for _ in range(lines)]
        self.scrollback: list[str] = []
        self.x = self.y = 0
        self.osc: list[str] = []
        self._wrap = True
        self._held = ""

    def write(self, text: str) -> int:
        """So that a Terminal can stand in for a stream."""
        self.feed(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered."""

    def isatty(self) -> bool:
        """It is one."""
        return True

    def feed(self, text: str) -> None:
        """Obey the text. Unknown sequences are an error: the test should know about them."""
        text = self._held + text
        cut = _CUT.search(text)
        self._held = cut.group() if cut else ""
        for private, numbers, final, osc, escape, char in _TOKEN.findall(text[: len(text) - len(self._held)]):
            if final:
                self._csi(private, [int(n or 0) for n in numbers.split(";")], final)
            elif osc:
                self.osc.append(osc)
            elif not escape:
                self._put(char)

    def _csi(self, private: str, numbers: list[int], final: str) -> None:
        n = max(1, numbers[0])
        if private == "?" and numbers == [7]:
            self._wrap = final == "h"
        if private or final in "mnqt":
            return
        if final == "A":
            self.y = max(0, self.y - n)
        elif final == "B":
            self.y = min(self.lines - 1, self.y + n)
        elif final == "C":
            self.x = min(self.columns - 1, self.x + n)
        elif final == "D":
            self.x = max(0, self.x - n)
        elif final == "G":
            self.x = n - 1
        elif final == "K":
            start, stop = {0: (self.x, self.columns), 1: (0, self.x + 1), 2: (0, self.columns)}[numbers[0]]
            self.grid[self.y][start:stop] = [" "] * (stop - start)
        elif final == "J":
            self.grid[self.y][self.x :] = [" "] * (self.columns - self.x)
            for row in range(self.y + 1, self.lines):
                self.grid[row] = [" "] * self.columns
        elif final not in "hlH":
            raise AssertionError(f"sequence CSI {numbers} {final} is not known to this terminal")

    def _put(self, char: str) -> None:
        if char == "\n":
            self.x = 0
            self._down()
        elif char == "\r":
            self.x = 0
        elif char == "\b":
            self.x = max(0, self.x - 1)
        elif char == "\t":
            self.x = min(self.columns - 1, self.x // 8 * 8 + 8)
        elif char >= " ":
            width = max(0, wcwidth(char))
            if width == 0:
                self.grid[self.y][max(0, self.x - 1)] += char
                return
            if self.x + width > self.columns:
                if not self._wrap:
                    return
                self.x = 0
                self._down()
            self.grid[self.y][self.x : self.x + width] = [char, *[""] * (width - 1)]
            self.x += width

    def _down(self) -> None:
        if self.y < self.lines - 1:
            self.y += 1
        else:
            self.scrollback.append("".join(self.grid.pop(0)).rstrip())
            self.grid.append([" "] * self.columns)

    @property
    def rows(self) -> list[str]:
        """The screen, without trailing blanks."""
        return ["".join(row).rstrip() for row in self.grid]

    @property
    def everything(self) -> list[str]:
        """Scrollback and screen, without the empty rows at the end."""
        rows = self.scrollback + self.rows
        while rows and not rows[-1]:
            rows.pop()
        return rows
