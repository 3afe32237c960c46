"""A chat in tmux, a real terminal: lines are typed, and what stands on the screen is read back."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = """
import json, sys
from fake_runtime import FakeRuntime, Info
from exl_runtime.cli import chat, main
from exl_runtime.tokenizer.template import ChatTemplate
replies, context, delay = json.loads(sys.argv[1])

def opened(args):
    runtime = FakeRuntime(list(replies), info=Info(context=context, name=args.model, path=args.model), delay=delay)
    runtime.template = ChatTemplate.from_text("<think>{{ enable_thinking }}")
    return runtime

chat.open_runtime = opened
sys.exit(main.guarded(main.main, ["chat", "fake-model", *sys.argv[2:]]))
"""


class Tmux:
    """One terminal of 90 x `rows` with one program in it. Use as a context manager."""

    def __init__(self, repo: Path, state: Path, command: list[str], *, rows: int = 30, **env: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="tmux")  # a name of a socket has to be short
        self._socket = f"{self._folder}/s"
        self._environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        self._environment["PYTHONPATH"] = f"{repo}{os.pathsep}{repo / 'tests'}"
        for name in ("TMUX", "NO_COLOR", "VISUAL", "EDITOR", "DISPLAY", "WAYLAND_DISPLAY"):
            self._environment.pop(name, None)
        self._environment |= env
        self.run("new-session", "-d", "-x", "90", "-y", str(rows), "-c", str(state), "exec " + shlex.join(command))

    def __enter__(self) -> "Tmux":
        return self

    def __exit__(self, *_: object) -> None:
        self.run("kill-server", check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, *arguments: str, check: bool = True) -> str:
        """A command of tmux."""
        command = ["tmux", "-S", self._socket, "-f", "/dev/null", *arguments]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=check).stdout

    def kill(self) -> list[str]:
        """Kill the program as a crash would; what was on the screen then."""
        self.run("set-option", "-g", "remain-on-exit", "on")
        os.kill(int(self.run("display-message", "-p", "#{pane_pid}")), signal.SIGKILL)
        end = time.monotonic() + 30
        while self.run("display-message", "-p", "#{pane_dead}").strip() != "1":
            assert time.monotonic() < end, "it does not die"
            time.sleep(0.05)
        return self.rows()

    def keys(self, *keys: str) -> None:
        """Keys by their names."""
        self.run("send-keys", *keys)

    def type(self, text: str) -> None:
        """Text, letter by letter."""
        self.run("send-keys", "-l", text)

    def rows(self) -> list[str]:
        """What stands on the screen, without blanks at the ends."""
        return [row.rstrip() for row in self.run("capture-pane", "-p").rstrip("\n").split("\n")]

    def wait(self, text: str, *, prompt: bool = True, seconds: float = 60.0) -> list[str]:
        """The screen, once `text` is on it and, with `prompt`, an empty prompt at its end."""
        end = time.monotonic() + seconds
        while True:
            rows = self.rows()
            while rows and not rows[-1]:
                rows.pop()
            if any(text in row for row in rows) and (not prompt or (rows and rows[-1] == ">")):
                return rows
            assert time.monotonic() < end, f"{text!r} did not appear on:\n" + "\n".join(rows)
            time.sleep(0.05)

    def say(self, line: str, seen: str) -> list[str]:
        """Clear the screen, type a line, wait for `seen`; the rows between that line and the next prompt."""
        self.keys("C-l")
        self.wait("")
        time.sleep(0.1)
        self.type(line)
        self.wait(line[-60:], prompt=False)
        self.keys("Enter")
        rows = self.wait(seen)
        first = next((index for index, row in enumerate(rows) if row.startswith("> ")), -1)
        return rows[first + 1 : -1]


def chat_command(replies: list[str], *options: str, context: int = 4000, delay: float = 0.0) -> list[str]:
    """A chat with a model whose replies are written down beforehand."""
    return [sys.executable, "-c", SCRIPT, json.dumps([replies, context, delay]), *options]
