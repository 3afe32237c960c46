"""What long work tells while it goes on: bars on a terminal, sparse lines elsewhere, JSON lines for programs.

The work itself sees `Progress` only. Names and texts may come out of files; nothing of them reaches a terminal as
control characters. Safe to call from several threads.
"""

import json
import math
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

from .terminal import escaped, is_tty

PLAIN_SECONDS = 10.0  # between two lines about one stage where no bar can be drawn
JSON_SECONDS = 0.5  # between two "progress" events
SETTLING = 1.0  # seconds in which a resumed stage skips what is done already; no measure of its pace

Clock = Callable[[], float]


class Steps(Protocol):
    """A stage that goes on."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more steps are done; `note` says in a word or two what comes, or came out."""
        ...


class Progress(Protocol):
    """What long work may call."""

    def stage(self, name: str, total: int, unit: str = "steps") -> AbstractContextManager[Steps]:
        """One long piece of work of `total` steps, from here to the end of the `with` block. Stages may nest."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def warn(self, text: str) -> None:
        """Something the user should know even when nothing else is shown."""
        ...


class Reporter(ABC):
    """`Progress` and, for the command line, its end. `warned`: the warnings so far. `program` begins every line."""

    def __init__(self, clock: Clock = time.monotonic, *, program: str = "exl") -> None:
        self.program = program
        self.warned: list[str] = []
        self._clock = clock
        self._lock = threading.RLock()

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "steps") -> Iterator["Stage"]:
        """See `Progress`. A stage that an error ends is not reported as done."""
        stage = Stage(self, printable(name, 60), max(0, total), printable(unit, 30), self._clock)
        with self._lock:
            self._begin(stage)
        completed = False
        try:
            yield stage
            completed = True
        finally:
            with self._lock:
                self._end(stage, completed)

    def say(self, text: str) -> None:
        """See `Progress`."""
        with self._lock:
            self._line(printable_lines(text))

    def warn(self, text: str) -> None:
        """See `Progress`."""
        with self._lock:
            self.warned.append(text)
            self._warning(printable_lines(text))

    def result(self, text: str, facts: Mapping[str, object]) -> None:
        """The end of a job: `text` (lines) for people on standard output. facts: what JSON lines hold instead."""
        with self._lock:
            sys.stdout.write(printable_lines(text) + "\n")
            sys.stdout.flush()

    def failed(self, kind: str, message: str) -> None:
        """An error as an event; people read it on standard error, from whoever catches it."""
        return

    def moved(self, stage: "Stage", n: int, note: str) -> None:
        """For `Stage`."""
        with self._lock:
            stage.pace.add(n)
            stage.note = printable(note, 60)
            self._step(stage)

    @abstractmethod
    def _begin(self, stage: "Stage") -> None: ...
    @abstractmethod
    def _step(self, stage: "Stage") -> None: ...
    @abstractmethod
    def _end(self, stage: "Stage", completed: bool) -> None: ...
    @abstractmethod
    def _line(self, text: str) -> None: ...
    @abstractmethod
    def _warning(self, text: str) -> None: ...


class Pace:
    """How far and how fast: steps done, seconds spent, seconds left. Work of an earlier run does not count as fast."""

    def __init__(self, total: int, clock: Clock) -> None:
        self.total = total
        self.done = 0
        self._clock = clock
        self._started = clock()
        self._base = (0.0, 0)  # when pace begins to count, and what was done by then

    def add(self, n: int) -> None:
        """`n` steps more, never beyond the total."""
        self.done = min(self.total, self.done + n)
        if self.elapsed <= SETTLING:
            self._base = (self.elapsed, self.done)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def remaining(self) -> float | None:
        """Seconds left at the pace so far; None when there is none yet."""
        start, before = self._base
        if self.done <= before or self.done >= self.total:
            return 0.0 if self.done >= self.total else None
        return (self.elapsed - start) / (self.done - before) * (self.total - self.done)


class Stage:
    """One stage of any reporter. `handle` and `shown_at` are the reporter's own."""

    def __init__(self, reporter: Reporter, name: str, total: int, unit: str, clock: Clock) -> None:
        self.name, self.unit, self.note = name, unit, ""
        self.pace = Pace(total, clock)
        self.shown_at = clock()
        self.handle: Any = None
        self._reporter = reporter

    def advance(self, n: int = 1, note: str = "") -> None:
        """See `Steps`."""
        self._reporter.moved(self, n, note)

    def counted(self) -> str:
        """ "12 layers", or "5 of 12 layers"."""
        done, total = self.pace.done, self.pace.total
        return f"{total} {self.unit}" if done == total else f"{done} of {total} {self.unit}"


class QuietReporter(Reporter):
    """Warnings and the result only."""

    def _begin(self, stage: Stage) -> None:
        return

    def _step(self, stage: Stage) -> None:
        return

    def _end(self, stage: Stage, completed: bool) -> None:
        return

    def _line(self, text: str) -> None:
        return

    def _warning(self, text: str) -> None:
        write_error(self.program, f"warning: {text}")


class PlainReporter(Reporter):
    """Lines on standard error, for logs: at the start and the end of a stage, and every `PLAIN_SECONDS` between."""

    def _begin(self, stage: Stage) -> None:
        write_error(self.program, f"{stage.name}: {stage.pace.total} {stage.unit}")

    def _step(self, stage: Stage) -> None:
        now, pace = self._clock(), stage.pace
        if now - stage.shown_at < PLAIN_SECONDS or pace.done == pace.total:
            return
        stage.shown_at = now
        left = "" if pace.remaining is None else f", about {clock_text(pace.remaining)} left"
        note = f" ({stage.note})" if stage.note else ""
        write_error(self.program, f"{stage.name}: {stage.counted()} in {clock_text(pace.elapsed)}{left}{note}")

    def _end(self, stage: Stage, completed: bool) -> None:
        if completed:
            write_error(self.program, f"{stage.name}: done, {stage.counted()} in {clock_text(stage.pace.elapsed)}")

    def _line(self, text: str) -> None:
        write_error(self.program, text)

    def _warning(self, text: str) -> None:
        write_error(self.program, f"warning: {text}")


class JsonReporter(Reporter):
    """One JSON object a line on standard output, {"event": "stage" | "progress" | "say" | "warning" | "done" | ...}."""

    def __init__(self, clock: Clock = time.monotonic, *, program: str = "exl") -> None:
        super().__init__(clock, program=program)
        self._last = -math.inf

    def _begin(self, stage: Stage) -> None:
        self._emit("stage", name=stage.name, state="start", total=stage.pace.total, unit=stage.unit)

    def _step(self, stage: Stage) -> None:
        now, pace = self._clock(), stage.pace
        if now - self._last < JSON_SECONDS:
            return
        self._last = now
        facts = {"name": stage.name, "done": pace.done, "total": pace.total, "unit": stage.unit, "note": stage.note}
        self._emit("progress", **facts, seconds=pace.elapsed, remaining=pace.remaining)

    def _end(self, stage: Stage, completed: bool) -> None:
        pace = stage.pace
        state = "end" if completed else "stopped"
        facts = {"name": stage.name, "state": state, "done": pace.done, "total": pace.total, "unit": stage.unit}
        self._emit("stage", **facts, seconds=pace.elapsed)

    def _line(self, text: str) -> None:
        self._emit("say", text=text)

    def _warning(self, text: str) -> None:
        self._emit("warning", text=text)

    def result(self, text: str, facts: Mapping[str, object]) -> None:
        """`facts` as one line, "done" unless they name another event."""
        with self._lock:
            self._emit(**{"event": "done", **facts})

    def failed(self, kind: str, message: str) -> None:
        """{"event": "error", "error": class of the error, "message": ...}."""
        with self._lock:
            self._emit("error", error=kind, message=message)

    def _emit(self, event: str, **facts: object) -> None:
        sys.stdout.write(json.dumps({"event": event, **_finite(facts)}, allow_nan=False) + "\n")
        sys.stdout.flush()


def choose_reporter(program: str = "exl", *, quiet: bool = False, json_lines: bool = False) -> Reporter:
    """The reporter for this process: JSON lines or quiet when asked for, bars on a terminal, else sparse lines."""
    if json_lines:
        return JsonReporter(program=program)
    if quiet:
        return QuietReporter(program=program)
    if is_tty(sys.stderr) and os.environ.get("TERM", "") not in ("", "dumb"):
        from .bars import BarReporter

        return BarReporter(program=program)
    return PlainReporter(program=program)


def printable(text: str, limit: int = 400) -> str:
    """One line: what is not printable becomes a visible escape such as \\x1b; long text is cut to `limit`."""
    shown = "".join(char if char.isprintable() else escaped(char) for char in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def printable_lines(text: str, limit: int = 1000) -> str:
    """Every line of `text` made printable, each at most `limit` characters."""
    return "\n".join(printable(line, limit) for line in text.split("\n"))


def clock_text(seconds: float) -> str:
    """ "0:07", "12:30", "3:05:00"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def write_error(program: str, text: str) -> None:
    """One message of `program` on standard error. A terminal or log that is gone or full does not end the work."""
    with suppress(OSError, ValueError, AttributeError):  # ValueError: closed; AttributeError: None, never opened
        sys.stderr.write(f"{program}: {text}\n")
        sys.stderr.flush()


def _finite(value: Any) -> Any:
    """JSON has neither infinities nor NaN: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
