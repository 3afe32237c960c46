"""/copy, where the desktop has a program that reaches its clipboard, and where it has none."""

from pathlib import Path

import pytest
from fake_runtime import FakeRuntime
from talking import Recorder, Typist

from exl_runtime.chat import clipboard, repl
from exl_runtime.chat.session import ChatSession


@pytest.fixture
def desktop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """desktop(name, script): puts a program into the only folder that is searched."""
    for variable, _ in clipboard.TOOLS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def add(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o700)

    return add


def say(screen: Recorder) -> str:
    repl.run(ChatSession(FakeRuntime(["It is \u00e9."])), screen, Typist("hi", "/copy"))
    return screen.said("notice") + screen.said("error")


def test_the_program_of_the_desktop_takes_it(desktop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desktop("xclip", f'echo "$@" > {tmp_path}/options; read -r line || true; echo "$line" > {tmp_path}/taken')
    assert "if the terminal allows it" in say(Recorder()), "without a display nothing is started"
    assert not (tmp_path / "taken").exists()
    monkeypatch.setenv("DISPLAY", ":0")
    assert "copied the reply (8 characters) with xclip" in say(Recorder())
    assert (tmp_path / "taken").read_text("utf-8") == "It is \u00e9.\n"
    assert (tmp_path / "options").read_text() == "-selection clipboard\n"


def test_one_that_fails_or_hangs_is_passed_over(desktop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipboard, "SECONDS", 0.3)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, ":0")
    desktop("wl-copy", "exit 1")
    desktop("xclip", "while :; do :; done")
    assert clipboard.offer("x") is None
    desktop("xsel", "exit 0")
    assert clipboard.offer("x") == "xsel"


def test_a_plain_terminal_without_any_says_so(desktop) -> None:
    screen = Recorder()
    screen.copy = lambda text: False
    assert "no clipboard that could be reached" in say(screen)
