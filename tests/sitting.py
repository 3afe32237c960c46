"""A person at a pseudo-terminal with the whole chat in it, run with a runtime that has no model."""

import codecs
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

from vt import Terminal

SCRIPT = """
import sys
from fake_runtime import FakeRuntime, Info
from exl_runtime.cli import chat, main
runtime = FakeRuntime(
    ["The **first** reply.", "word " * 400, "Another one.", "Last."], info=Info(context=4000), delay=float(sys.argv[1])
)
chat.open_runtime = lambda args: runtime
sys.exit(main.guarded(main.main, ["chat", "model", *sys.argv[2:]]))
"""


class Person:
    """Somebody at a terminal of 80 x 24: types, and waits for what should appear."""

    def __init__(self, repo: Path, state: Path, *options: str, delay: float = 0.0, **environment: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(delay), *options],
            cwd=state,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C reaches it as a signal
            env=inherited
            | {
                "PYTHONPATH": f"{repo}{os.pathsep}{repo / 'tests'}",
                "XDG_STATE_HOME": str(state),
                "TERM": "xterm-256color",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            }
            | environment,
        )
        os.close(slave)
        self.raw = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.terminal = Terminal(80, 24)
        self.row = 0  # where the last thing waited for stands, scrollback included

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 20.0) -> None:
        """Until `text` stands in or below the row of what was waited for before."""
        self._wait(lambda: any(text in row for row in self.terminal.everything[self.row :]), repr(text), seconds)
        rows = self.terminal.everything[self.row :]
        self.row += next(index for index, row in enumerate(rows) if text in row)

    def wait_for_prompt(self) -> None:
        """Until the cursor stands behind an empty prompt."""
        self._wait(lambda: self.terminal.rows[self.terminal.y] == ">", "the prompt", 20.0)
        self.row = len(self.terminal.scrollback) + self.terminal.y
        time.sleep(0.05)  # the editor draws its prompt before it listens

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or not self._read(0.2):
                raise AssertionError(f"{what} did not appear; on the screen:\n" + "\n".join(self.terminal.everything))

    def leave(self, seconds: float = 10.0) -> int:
        """Wait for the end; the exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.1)
        return self.process.wait(1)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], seconds)
        if ready:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the other side is gone
                return False
            text = self._decoder.decode(data)
            self.raw += text
            self.terminal.feed(text)
            return bool(data)
        return self.process.poll() is None
