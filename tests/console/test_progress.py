"""What is shown, when, and where: every reporter under a clock that only the test moves."""

import io
import itertools
import json
import re
import sys
import threading

import pytest
from rich.console import Console

from exl_runtime.console import progress
from exl_runtime.console.bars import BarReporter
from exl_runtime.console.progress import (
    JsonReporter,
    Pace,
    PlainReporter,
    QuietReporter,
    Reporter,
    choose_reporter,
    clock_text,
    printable,
    printable_lines,
)

HOSTILE = "layer\x1b[31m\x07\n\u202e9\u2028"
SHOWN = "layer\\x1b[31m\\x07\\x0a\\u202e9\\u2028"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def work(reporter: Reporter, clock: Clock, steps: int = 12, seconds: float = 4.0) -> None:
    with reporter.stage("Capture", steps, "layers") as stage:
        for step in range(steps):
            clock.now += seconds
            stage.advance(note=f"q{step}")


def test_plain_lines_are_sparse(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(PlainReporter(clock), clock)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "exl: Capture: 12 layers",
        "exl: Capture: 3 of 12 layers in 0:12, about 0:36 left (q2)",
        "exl: Capture: 6 of 12 layers in 0:24, about 0:24 left (q5)",
        "exl: Capture: 9 of 12 layers in 0:36, about 0:12 left (q8)",
        "exl: Capture: done, 12 layers in 0:48",
    ]


def test_a_thousand_quick_steps_are_two_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(PlainReporter(clock), clock, 1000, 0.009)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_ended_stage_is_not_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for reporter in (PlainReporter(clock), BarReporter(Console(stderr=True), clock)):
        with pytest.raises(ZeroDivisionError), reporter.stage("Encode", 5):
            raise ZeroDivisionError
        assert "done" not in (err := capsys.readouterr().err) and "0 of 5" not in err
    with PlainReporter(clock).stage("Short", 5) as stage:
        stage.advance(2)
    assert capsys.readouterr().err.endswith("exl: Short: done, 2 of 5 steps in 0:00\n")


def test_quiet_shows_warnings_and_the_result(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = QuietReporter(clock)
    work(reporter, clock)
    reporter.say("hello")
    reporter.warn("careful\x1b")
    reporter.result("made it", {})
    assert capsys.readouterr() == ("made it\n", "exl: warning: careful\\x1b\n")
    assert reporter.warned == ["careful\x1b"]


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    out, err = capsys.readouterr()
    assert err == "" and out.isascii()
    return [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]


def test_json_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = JsonReporter(clock)
    work(reporter, clock, 3)
    reporter.say("a line")
    reporter.warn("careful")
    reporter.failed("ConvertError", "bad\n  hint: worse")
    reporter.result("for people", {"bits": 4.0, "kl": float("nan"), "list": [float("inf"), "x"], "folder": None})
    seen = events(capsys)
    assert seen[0] == {"event": "stage", "name": "Capture", "state": "start", "total": 3, "unit": "layers"}
    step = {"event": "progress", "name": "Capture", "done": 1, "total": 3, "unit": "layers", "note": "q0"}
    assert seen[1] == {**step, "seconds": 4.0, "remaining": 8.0}
    assert [entry["done"] for entry in seen[1:4]] == [1, 2, 3] and seen[3]["remaining"] == 0
    assert seen[4] == {**seen[0], "state": "end", "done": 3, "seconds": 12.0}
    assert seen[5:] == [
        {"event": "say", "text": "a line"},
        {"event": "warning", "text": "careful"},
        {"event": "error", "error": "ConvertError", "message": "bad\n  hint: worse"},
        {"event": "done", "bits": 4.0, "kl": None, "list": [None, "x"], "folder": None},
    ]


def test_json_progress_comes_twice_a_second(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(JsonReporter(clock), clock, 1000, 0.01)
    steps = [entry for entry in events(capsys) if entry["event"] == "progress"]
    assert 18 <= len(steps) <= 21
    apart = [later["seconds"] - earlier["seconds"] for earlier, later in itertools.pairwise(steps)]
    assert min(apart) >= 0.499
    with pytest.raises(KeyError), JsonReporter(clock).stage("Encode", 2):
        raise KeyError
    assert events(capsys)[-1]["state"] == "stopped"


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, legacy_windows=False)


def test_bars(clock: Clock, terminal: Console) -> None:
    reporter = BarReporter(terminal, clock)
    with reporter.stage("Encode [red]", 4, "layers") as stage:
        clock.now += 60
        stage.advance(note="down_proj")
        reporter._bars.refresh()
        with reporter.stage("inner", 2):
            reporter.say("a [bold] line")
        assert reporter._bars.live.is_started
    assert not reporter._bars.live.is_started
    reporter.warn("careful")
    shown = terminal.file.getvalue()
    assert "Encode [red]" in shown and "1/4 layers  1:00, 3:00 left  down_proj" in shown
    assert re.search(r"Encode \[red\] \S+ +1/4 layers", shown)
    assert "a [bold] line" in shown and "warning: careful" in shown
    lines = shown.replace("\r", "\n").split("\n")
    assert any(line.endswith("Encode [red]: 1 of 4 layers in 1:00") for line in lines)
    with reporter.stage("again", 0, "files"):
        pass
    assert "again: 0 files in 0:00" in terminal.file.getvalue()


def test_bars_keep_running_while_a_step_takes_long(clock: Clock, terminal: Console) -> None:
    reporter = BarReporter(terminal, clock)
    with reporter.stage("Encode", 4) as stage:
        clock.now += 40
        stage.advance()
        clock.now += 35  # longer than rich's memory
        reporter._bars.refresh()
    assert "1/4 steps  1:15, 3:45 left" in terminal.file.getvalue()


@pytest.mark.parametrize("kind", ["plain", "quiet", "json", "bars"])
def test_names_cannot_steer_a_terminal(
    kind: str, clock: Clock, terminal: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"plain": PlainReporter, "quiet": QuietReporter, "json": JsonReporter}
    reporter = BarReporter(terminal, clock) if kind == "bars" else made[kind](clock)
    with reporter.stage(HOSTILE, 2, HOSTILE) as stage:
        clock.now += 20
        stage.advance(note=HOSTILE)
        if kind == "bars":
            reporter._bars.refresh()
    reporter.say(HOSTILE)
    reporter.warn(HOSTILE)
    reporter.result(HOSTILE, {"name": HOSTILE})
    out, err = capsys.readouterr()
    text = out + err + terminal.file.getvalue()
    for bad in ("\x1b[31m", "\x07", "\u202e", "\u2028"):
        assert bad not in text
    assert "layer\\" in text


def test_printable() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("naïve 日本 😀") == "naïve 日本 😀"
    assert printable("a" * 500, 10) == "a" * 9 + "…" and printable("\ud800") == "\\ud800"
    assert printable_lines("a\x1b\nb") == "a\\x1b\nb"


def test_pace_ignores_what_an_earlier_run_did(clock: Clock) -> None:
    pace = Pace(12, clock)
    assert pace.remaining is None
    clock.now += 0.5
    pace.add(8)
    assert pace.remaining is None
    clock.now += 30
    pace.add(1)
    assert pace.remaining == 90 and pace.elapsed == 30.5
    pace.add(100)
    assert pace.done == 12 and pace.remaining == 0


def test_pace_of_an_ordinary_stage_counts_from_the_start(clock: Clock) -> None:
    pace = Pace(4, clock)
    clock.now += 10
    pace.add(1)
    assert pace.remaining == 30


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00")])
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def test_threads_lose_no_steps(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with JsonReporter(clock).stage("Encode", 4000) as stage:
        threads = [threading.Thread(target=lambda: [stage.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert events(capsys)[-1]["done"] == 4000


class Stream(io.StringIO):
    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def test_which_reporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Stream(tty=True))
    assert type(choose_reporter()) is BarReporter
    assert type(choose_reporter(quiet=True)) is QuietReporter
    assert type(choose_reporter(json_lines=True)) is JsonReporter
    monkeypatch.setenv("TERM", "dumb")
    assert type(choose_reporter()) is PlainReporter
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Stream(tty=False))
    assert type(choose_reporter()) is PlainReporter
    monkeypatch.setattr(sys, "stderr", None)
    reporter = choose_reporter()
    reporter.warn("nobody hears it")
    assert type(reporter) is PlainReporter


def test_a_lost_terminal_does_not_end_the_work(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    work(PlainReporter(clock), clock)
    progress.write_error("exl", "x")
