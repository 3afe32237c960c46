"""Branches, kept conversations and crashes as a person sees them, in a pseudo-terminal and in tmux."""

import base64
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sitting import SCRIPT, Person


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


def test_branches_on_the_screen(sit_down) -> None:
    person = sit_down()
    for typed, seen in (
        ("hello", "The first reply."),
        ("/edit 0 other", "word word"),
        ("/regen", "reply 2 of 2"),
        ("/branches", "3*"),
        ("/goto 1", "assistant: The **first** reply."),
        ("/branches", "1*"),
        ("/brnaches", "did you mean /branches?"),
    ):
        person.wait_for_prompt()
        person.type(f"{typed}\r")
        person.wait_for(seen)
    person.wait_for_prompt()
    table = [row.split() for row in person.terminal.everything if row.lstrip()[:2] in ("1*", "2 ", "3 ")][-3:]
    assert [(row[0], row[-1]) for row in table] == [("1*", "reply."), ("2", "word"), ("3", "one.")], table


def test_copy_reaches_the_clipboard(sit_down) -> None:
    person = sit_down()
    person.wait_for_prompt()
    person.type("hello\r")
    person.wait_for("The first reply.")
    person.wait_for_prompt()
    person.type("/copy\r")
    person.wait_for("copied the reply")
    kind, target, data = person.terminal.osc[-1].split(";")
    assert (kind, target, base64.b64decode(data)) == ("52", "c", b"The **first** reply.")


def test_killed_in_the_middle_of_a_reply_and_resumed(sit_down, tmp_path: Path) -> None:
    person = sit_down(delay=0.01)
    person.wait_for_prompt()
    person.type("hello there\r")
    person.wait_for("gen 20 tok")
    person.wait_for_prompt()
    person.type("tell me more\r")
    person.wait_for("word word word")
    os.kill(person.process.pid, signal.SIGKILL)
    assert person.leave() == -signal.SIGKILL
    kept = list((tmp_path / "exl-runtime" / "chats").iterdir())
    assert len(kept) == 2, "the file and its journal"

    person = sit_down("--resume")
    person.wait_for("loaded 4 messages")
    person.wait_for("user: tell me more")
    person.wait_for("assistant: word word word")
    person.wait_for("/continue goes on with it")
    person.wait_for_prompt()
    person.type("/continue\r")
    person.wait_for("The first reply.")  # what this runtime says first
    person.wait_for_prompt()
    person.type("/exit\r")
    person.wait_for("exl chat --resume goes on")
    assert person.leave() == 0
    assert len(list((tmp_path / "exl-runtime" / "chats").iterdir())) == 1

    person = sit_down("--list")
    person.wait_for("1  hello there")
    assert person.leave() == 0 and "2 messages" in person.raw and "fake-model" in person.raw


def test_nothing_is_kept_against_the_will(sit_down, tmp_path: Path) -> None:
    person = sit_down("--no-keep")
    person.wait_for_prompt()
    person.type("hello\r")
    person.wait_for("The first reply.")
    person.wait_for_prompt()
    person.type("\x04")
    assert person.leave() == 0
    assert not (tmp_path / "exl-runtime" / "chats").exists()
    person = sit_down("--resume")
    person.wait_for("no conversation was kept yet")
    assert person.leave() == 2


def test_the_editor_of_the_user(sit_down, tmp_path: Path) -> None:
    script = tmp_path / "edit.sh"
    script.write_text('#!/bin/sh\nread answer < /dev/tty\necho "written $answer" >> "$1"\n')
    script.chmod(0o755)
    person = sit_down(EDITOR=str(script), VISUAL="")
    person.wait_for_prompt()
    person.type("/editor\r")
    time.sleep(0.3)
    person.type("by hand\r")  # the editor has the keyboard for itself, line by line
    person.wait_for("written by hand")
    person.wait_for("The first reply.")
    person.wait_for_prompt()
    person.type("start \x18\x05")  # Ctrl-X Ctrl-E takes the line along
    time.sleep(0.3)
    person.type("in between\r")
    person.wait_for("written in between")
    person.type("\x03\x04")


def test_esc_stops_a_reply_and_other_keys_wait_for_the_prompt(sit_down) -> None:
    person = sit_down(delay=0.01)
    person.wait_for_prompt()
    person.type("hello\r")
    person.wait_for("gen 20 tok")
    person.wait_for_prompt()
    person.type("go\r")
    person.wait_for("word word")
    person.type("\x1b[D")  # an arrow key is no Esc
    person.type("typed ah\u00e4d")
    time.sleep(0.3)
    person.type("\x1b")
    person.wait_for("stopped by you")
    person.wait_for("> typed ah\u00e4d")
    person.type("\x03")
    person.wait_for_prompt()
    person.type("/turns\r")
    person.wait_for("word word")
    assert "^[" not in person.raw, "keys were not echoed into the reply"


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_in_tmux_the_screen_reads_as_it_should(repo: Path, tmp_path: Path) -> None:
    socket = str(tmp_path / "tmux")
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    environment["PYTHONPATH"] = f"{repo}{os.pathsep}{repo / 'tests'}"
    environment.pop("TMUX", None)
    environment.pop("NO_COLOR", None)

    def tmux(*arguments: str) -> str:
        command = ["tmux", "-S", socket, "-f", "/dev/null", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def wait_for(text: str) -> list[str]:
        end = time.monotonic() + 30
        while text not in (screen := tmux("capture-pane", "-p")):
            assert time.monotonic() < end, f"{text!r} did not appear on:\n{screen}"
            time.sleep(0.1)
        return [row.rstrip() for row in screen.rstrip().split("\n")]

    chat = shlex.join([sys.executable, "-c", SCRIPT, "0.002"])
    tmux("new-session", "-d", "-x", "78", "-y", "20", chat)
    try:
        wait_for("Ctrl-D quits")
        time.sleep(0.3)
        tmux("send-keys", "hello", "Enter")
        wait_for("gen 20 tok")
        tmux("send-keys", "more", "Enter")
        wait_for("word word")
        tmux("send-keys", "C-c")
        wait_for("stopped by you")
        time.sleep(0.3)
        tmux("send-keys", "/turns", "Enter")
        wait_for("1    user")
        tmux("send-keys", "-l", "typed but not sent")
        rows = wait_for("> typed but not sent")
        assert rows[rows.index("> hello") :] == [
            "> hello",
            "The first reply.",
            "prompt 23 tok 46 t/s · gen 20 tok 9.5 t/s · ctx [--------] 43/4k",
            "> more",
            *(row for row in rows if row.startswith("word")),
            *(row for row in rows if "66 tok" in row),
            "stopped by you (/continue goes on)",
            "> /turns",
            "0    user             hello",
            "     assistant        The **first** reply.",
            "1    user             more",
            *(row for row in rows if row.startswith("     assistant        word")),
            "> typed but not sent",
        ]
    finally:
        tmux("kill-server")
