"""Runs a stage as a process of its own and keeps what it gave in a file, so that a second run goes on from there."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exl_runtime.files import write_json

from .stages import Stage

TAIL = 2000  # characters of output that are kept of a process that failed
COUNTS = re.compile(r"(\d+) (passed|failed|error|errors|skipped)\b")


@dataclass(frozen=True, slots=True)
class Ran:
    """A process that has ended: its code, output, and how long it took. code None: it was stopped at its limit."""

    code: int | None
    output: str
    seconds: float


Run = Callable[[Stage, float], Ran]  # a stage, the seconds it may take


@dataclass(frozen=True, slots=True)
class Result:
    """What a stage gave. why: None, or in a line why it gave nothing."""

    stage: str
    seconds: float = 0.0
    why: str | None = None
    facts: Mapping[str, object] = field(default_factory=dict)


def run_process(stage: Stage, limit: float) -> Ran:
    """`Run` for real."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            stage.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired as err:
        output = err.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return Ran(None, text, time.perf_counter() - started)
    return Ran(done.returncode, done.stdout, time.perf_counter() - started)


def run_stage(
    stage: Stage,
    out: Path,
    before: Mapping[str, Result],
    *,
    limit: float,
    again: bool = False,
    run: Run = run_process,
    find: Callable[[str], str | None] = shutil.which,
) -> Result:
    """What a stage gave in an earlier run, or gives now; kept in out/NAME.json.

    before  the stages that came before it      limit  seconds it may take      again  run it anew
    """
    found = None if again else known(out, stage)
    if found is None:
        found = _run(stage, before, limit, run, find)
        write_json(out / f"{stage.name}.json", asdict(found))
    return found


def known(out: Path, stage: Stage) -> Result | None:
    """What an earlier run has kept of a stage; None where it gave nothing, so that it is tried again."""
    try:
        found = Result(**json.loads((out / f"{stage.name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.why is None else None


def _run(
    stage: Stage, before: Mapping[str, Result], limit: float, run: Run, find: Callable[[str], str | None]
) -> Result:
    for name in stage.needs:
        if name in before and (why := before[name].why) is not None:
            return Result(stage.name, why=f"needs {name}: {why}")
    if stage.program is not None and find(stage.program) is None:
        return Result(stage.name, why=f"{stage.program} is not on PATH")
    ran = run(stage, limit)
    if ran.code is None:
        return Result(stage.name, ran.seconds, f"not done after {limit:.0f} s", {"output": ran.output[-TAIL:]})
    if stage.gives == "tests":
        counts = _counts(ran.output)
        ended = ran.code in (0, 1, 9) and counts  # 9: what compute-sanitizer was told to end with
        why = None if ended else f"pytest did not finish (code {ran.code})"
        kept = {} if ran.code == 0 else {"output": ran.output[-TAIL:]}
        return Result(stage.name, ran.seconds, why, {"code": ran.code, **counts, **kept})
    last = _last(ran.output)
    if ran.code != 0:
        why = str(last.get("message") or _line(ran.output))
        return Result(stage.name, ran.seconds, why.splitlines()[0][:300], {"output": ran.output[-TAIL:]})
    if stage.gives == "facts" and last.get("event") != "done":
        return Result(stage.name, ran.seconds, "it gave no figures", {"output": ran.output[-TAIL:]})
    return Result(stage.name, ran.seconds, None, last if stage.gives == "facts" else {"seconds": ran.seconds})


def _last(output: str) -> dict[str, object]:
    """The last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _counts(output: str) -> dict[str, int]:
    """ "3 failed, 12 passed" -> numbers by word, errors as failures; of the last line that has any."""
    for line in reversed(output.splitlines()):
        if pairs := COUNTS.findall(line):
            counts = {"passed": 0, "failed": 0, "skipped": 0}
            for number, word in pairs:
                counts["failed" if word.startswith("error") else word] += int(number)
            return counts
    return {}


def _line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"
