"""Progress bars on a terminal. The only file of the room that knows rich, and imported only when bars are drawn."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .progress import Clock, Reporter, Stage, clock_text


class BarReporter(Reporter):
    """Bars with the time spent and the time left, on a terminal; every stage leaves one line behind."""

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic, *, program: str = "exl") -> None:
        super().__init__(clock, program=program)
        self._console = console = console or Console(stderr=True)
        self._open = 0
        # Rich's own estimate forgets what is older than half a minute, which is less than a layer may take: see `Pace`.
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def _begin(self, stage: Stage) -> None:
        if not self._open:
            self._bars.start()
        self._open += 1
        stage.handle = self._bars.add_task(stage.name, total=max(1, stage.pace.total), text=_Tail(stage))

    def _step(self, stage: Stage) -> None:
        self._bars.update(stage.handle, completed=stage.pace.done)

    def _end(self, stage: Stage, completed: bool) -> None:
        self._bars.remove_task(stage.handle)
        self._open -= 1
        if not self._open:
            self._bars.stop()
        if completed:
            self._line(f"{stage.name}: {stage.counted()} in {clock_text(stage.pace.elapsed)}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _warning(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


class _Tail:
    """What stands behind a bar; formatted anew with every frame, so that the clock runs between two steps."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __format__(self, spec: str) -> str:
        pace = self._stage.pace
        left = "" if pace.remaining is None else f", {clock_text(pace.remaining)} left"
        note = f"  {self._stage.note}" if self._stage.note else ""
        return f"{pace.done}/{pace.total} {self._stage.unit}  {clock_text(pace.elapsed)}{left}{note}"
