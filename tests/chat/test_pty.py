"""The whole chat in a real terminal (a pseudo-terminal), with a runtime that has no model."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sitting import Person


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
