"""The whole chat in a real terminal (a pseudo-terminal), with a runtime that has no model."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
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


@pytest.fixture
def sit_down(repo: Path, tmp_path: Path) -> Iterator:
    people: list[Person] = []

    def start(*options: str, **given: object) -> Person:
        people.append(Person(repo, tmp_path, *options, **given))
        return people[-1]

    yield start
    for person in people:
        if person.process.poll() is None:
            person.process.kill()
            person.process.wait()
        os.close(person.master)


def test_a_chat_in_a_terminal(sit_down, tmp_path: Path) -> None:
    person = sit_down(delay=0.004)
    person.wait_for("fake-model")
    person.wait_for("context 4000")
    person.wait_for_prompt()
    person.type("hello there\r")
    person.wait_for("The first reply.")  # the asterisks have become bold
    person.wait_for("gen 20 tok")
    person.wait_for("ctx [")
    person.wait_for_prompt()
    person.type("tell me more\r")
    person.wait_for("word word word")
    person.type("\x03")
    person.wait_for("stopped by you")
    person.wait_for_prompt()
    person.type("/turns\r")
    person.wait_for("word word word")
    person.wait_for_prompt()
    person.type("/regen\r")
    person.wait_for("Another one.")
    person.wait_for("cached")
    person.wait_for_prompt()
    person.type(f"/save {tmp_path}/talk.json\r")
    person.wait_for("saved 4 messages")
    person.wait_for_prompt()
    person.type("/exit\r")
    assert person.leave() == 0
    assert (tmp_path / "exl-runtime" / "history").read_text().count("+hello there") == 1
    assert '"Another one."' in (tmp_path / "talk.json").read_text()
    assert "Traceback" not in person.raw


def test_several_lines_and_two_interrupts(sit_down) -> None:
    person = sit_down()
    person.wait_for_prompt()
    person.type("one\x1b\rtwo\r")  # Alt-Enter
    person.wait_for("The first reply.")
    person.wait_for_prompt()
    person.type("\x1b[200~pasted\ntext\x1b[201~")  # bracketed paste: its line end does not send
    person.wait_for("text")
    person.type("\x03")  # empties the line
    time.sleep(0.3)
    person.type("/turns\r")
    person.wait_for("one two")
    person.wait_for_prompt()
    person.type("\x03")
    person.wait_for("again")
    person.wait_for_prompt()
    person.type("\x03")
    assert person.leave() == 0


def test_interrupt_then_quit(sit_down) -> None:
    person = sit_down(delay=0.05)
    person.wait_for_prompt()
    person.type("go\r")
    person.wait_for("The")
    os.kill(person.process.pid, signal.SIGINT)
    person.wait_for("stopped by you")
    person.wait_for_prompt()
    person.type("\x03")
    assert person.leave() == 0


@pytest.mark.parametrize("how", ["plain", "dumb"])
def test_without_styles(sit_down, how: str) -> None:
    person = sit_down("--plain") if how == "plain" else sit_down(TERM="dumb")
    person.wait_for_prompt()
    person.type("hello\n")
    person.wait_for("The **first** reply.")
    person.wait_for_prompt()
    person.type("\x04")
    assert person.leave() == 0
    assert "\x1b" not in person.raw


def test_no_color_means_no_color(sit_down) -> None:
    person = sit_down(NO_COLOR="1")
    person.wait_for_prompt()
    person.type("hello\r")
    person.wait_for("The **first** reply.")
    person.wait_for_prompt()
    person.type("\x04")
    assert person.leave() == 0
    assert not re.search(r"\x1b\[[\d;]*[34]\d(;\d+)*m", person.raw), "no colour was set"


def test_colors_are_there_otherwise(sit_down) -> None:
    person = sit_down()
    person.wait_for_prompt()
    person.type("/set temprature 1\r")
    person.wait_for("did you mean")
    assert re.search(r"\x1b\[31m", person.raw)
