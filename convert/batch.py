"""Many conversions out of one TOML file: read and checked as a whole before the first one starts, then one by one.

    [defaults]                      # for every job that does not say otherwise
    calibration = ["text.txt"]

    [[job]]
    in = "models/source"
    out = "models/result-{bits}bpw"
    bits = [3.0, 4.0, 5.0]          # a ladder: a job for each; {bits} in `out` and `work` becomes 3.0, 4.0, 5.0

Keys are the long options without dashes (`source` is as good as `in`); relative paths begin at the folder of the file.

Jobs with the encoder `best` that measure the same (source, calibration, rows, length, seed) share the measurement of
the first one of them, out of its finished folder, unless they name one of their own.
"""

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl_runtime.config.fields import shown
from exl_runtime.console.progress import Reporter, clock_text
from exl_runtime.console.sizes import parse_size, size_text
from exl_runtime.errors import ExlError, UsageError

from .options import JobOptions, spelling, validated, work_folder

if TYPE_CHECKING:
    from .job import Outcome

MEASUREMENT = "measurement.json"  # in the folder of a finished conversion
MARK = "{bits}"
FAILED = 2  # exit code
_FIELDS = {spelling(field.name): field.name for field in fields(JobOptions)}
_PATHS = ("source", "out", "work", "measurement")
_FLAGS = ("measure_only",)
_WORDS = ("cache", "encoder", "device")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A job and how it ended: "done", "finished before" or "failed"."""

    options: JobOptions
    state: str
    outcome: "Outcome | None" = None
    problem: str = ""


def read_batch(path: Path) -> list[JobOptions]:
    """The jobs of a batch file, in order. Raises UsageError naming the file, the job and the key."""
    content = _parsed(path)
    _require_known(content, ("defaults", "job"), f"{path}")
    defaults = content.get("defaults", {})
    tables = content.get("job")
    if not isinstance(defaults, dict):
        raise UsageError(f"{path}: [defaults] is not a table")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}: holds no [[job]]", hint='a job is [[job]], then lines such as in = "FOLDER"')
    defaults = _spelled(defaults, f"{path}: [defaults]")
    jobs: list[JobOptions] = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: job {number}"
        own = _spelled(table, where)
        jobs += _jobs_of({**_useful(defaults, own), **own}, path.absolute().parent, where)
    _require_apart(jobs, path)
    return _sharing(jobs)


def run_batch(jobs: Sequence[JobOptions], run: "Callable[[JobOptions], Outcome]", reporter: Reporter) -> int:
    """Run the jobs one by one and show a table. Exit code: 0, or 2 when one failed; the others run all the same.

    A job whose folder is finished is passed over. One whose shared measurement was not made measures by itself, and
    the jobs behind it use what it made. Only an ExlError counts as a failed job; anything else ends the batch.
    """
    promised = {job.out / MEASUREMENT for job in jobs if job.out is not None}
    made: dict[Path, Path] = {}  # a promised file that was never made -> what stands in for it
    entries = []
    for number, job in enumerate(jobs, 1):
        promise = job.measurement if job.measurement in promised else None
        absent = promise is not None and not promise.is_file()
        if absent:
            job = replace(job, measurement=made.get(promise))
        entry = _run_one(job, f"job {number} of {len(jobs)}: {_name(job)}", run, reporter)
        entries.append(entry)
        if absent and job.out is not None and (own := job.out / MEASUREMENT).is_file():
            made.setdefault(promise, own)
    facts = [_facts(entry) for entry in entries]
    reporter.result(_table(entries), {"event": "batch", "jobs": facts})
    return FAILED if any(entry.state == "failed" for entry in entries) else 0


def _run_one(job: JobOptions, title: str, run: "Callable[[JobOptions], Outcome]", reporter: Reporter) -> _Entry:
    if job.out is not None and not job.measure_only and (job.out / "config.json").is_file():
        reporter.say(f"{title}: finished before")
        return _Entry(job, "finished before")
    reporter.say(title)
    try:
        return _Entry(job, "done", run(job))
    except ExlError as err:
        reporter.warn(f"{title} failed: {err}")
        reporter.failed(type(err).__name__, str(err))
        return _Entry(job, "failed", problem=err.problem)


def _name(job: JobOptions) -> str:
    return str(job.out if job.out is not None else work_folder(job))


# --- reading --------------------------------------------------------------------------------------------------------


def _parsed(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file", hint="check the path given with --batch") from None
    except OSError as err:
        raise UsageError(f"{path}: cannot be read: {err.strerror or err}") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as err:
        raise UsageError(f"{path}: not TOML: {err}", hint="see `--help` for an example") from err


def _require_known(table: Mapping[str, object], known: Any, where: str) -> None:
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise UsageError(
                f"{where}: unknown key {shown(key)}",
                hint=f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}",
            )


def _spelled(table: Mapping[str, object], where: str) -> dict[str, object]:
    """The table with known keys only; `source` is another word for `in`."""
    if "in" in table and "source" in table:
        raise UsageError(f"{where}: both in and source, which are the same", hint="leave out one of them")
    table = {"in" if key == "source" else key: value for key, value in table.items()}
    _require_known(table, _FIELDS, where)
    return table


def _useful(defaults: Mapping[str, object], table: Mapping[str, object]) -> dict[str, object]:
    """The defaults without those that the job replaces by naming their alternative."""
    dropped: set[str] = set()
    if "bits" in table:
        dropped |= {"target-vram", "context", "cache"}
    if "target-vram" in table:
        dropped |= {"bits"}
    return {key: value for key, value in defaults.items() if key not in dropped}


def _jobs_of(table: Mapping[str, Any], base: Path, where: str) -> list[JobOptions]:
    if "in" not in table:
        raise UsageError(f"{where}: in is missing", hint='in = "FOLDER" names the model')
    ladder = table.get("bits")
    if ladder == []:
        raise UsageError(f"{where}: bits is an empty list")
    for key in ("out", "work"):
        if isinstance(ladder, list) and isinstance(table.get(key), str) and MARK not in table[key]:
            raise UsageError(
                f"{where}: bits is a list, so {key} must contain {MARK}", hint=f'{key} = "result-{MARK}bpw"'
            )
    jobs = []
    for bits in ladder if isinstance(ladder, list) else [ladder]:
        values = {key: value for key, value in table.items() if key != "bits"}
        if bits is not None:
            values["bits"] = bits
            number = _value("bits", bits, base, where)
            values |= {
                key: values[key].replace(MARK, str(number))
                for key in ("out", "work")
                if isinstance(values.get(key), str)
            }
        found = {_FIELDS[key]: _value(key, value, base, where) for key, value in values.items()}
        try:
            jobs.append(validated(JobOptions(**found)))
        except UsageError as err:
            raise UsageError(f"{where}: {err.problem}", hint=err.hint) from err
    return jobs


def _value(key: str, value: Any, base: Path, where: str) -> Any:
    """A TOML value as the field wants it."""
    name = _FIELDS[key]
    if name == "calibration":
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) and text for text in texts):
            return tuple(_path(text, base) for text in texts)
        raise UsageError(f"{where}: {key} must be a path or a list of paths, is {shown(value)}")
    if name in _PATHS or name in _WORDS or name == "target_vram":
        if not isinstance(value, str) or not value:
            raise UsageError(f"{where}: {key} must be a text, is {shown(value)}")
        if name == "target_vram":
            try:
                return parse_size(value)
            except UsageError as err:
                raise UsageError(f"{where}: {key}: {err.problem}", hint=err.hint) from err
        return value if name in _WORDS else _path(value, base)
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: {key} must be true or false, is {shown(value)}")
        return value
    kinds, wanted = ((int, float), "a number") if name == "bits" else ((int,), "a whole number")
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UsageError(f"{where}: {key} must be {wanted}, is {shown(value)}")
    return float(value) if name == "bits" else value


def _path(text: str, base: Path) -> Path:
    path = Path(text)
    with suppress(RuntimeError):  # ~somebody who does not exist: a folder of that name, then
        path = path.expanduser()
    return base / path


def _require_apart(jobs: Sequence[JobOptions], path: Path) -> None:
    for what, place in (("out", lambda job: job.out), ("work", work_folder)):
        seen = set()
        for job in jobs:
            folder = place(job)
            if folder is not None and folder in seen:
                raise UsageError(f"{path}: two jobs have the same {what}: {folder}", hint="give each its own")
            seen.add(folder)


def _sharing(jobs: Sequence[JobOptions]) -> list[JobOptions]:
    makers: dict[object, Path] = {}
    shared = []
    for job in jobs:
        key = (job.source.resolve(), job.calibration, job.rows, job.length, job.seed)
        if job.encoder == "best" and not job.measure_only and job.measurement is None and job.out is not None:
            if key in makers:
                job = replace(job, measurement=makers[key])
            else:
                makers[key] = job.out / MEASUREMENT
        shared.append(job)
    return shared


# --- the table ------------------------------------------------------------------------------------------------------


def _table(entries: Sequence[_Entry]) -> str:
    rows = [("result", "state", "bits", "size", "KL mean", "time")]
    for entry in entries:
        outcome, name = entry.outcome, _name(entry.options)
        if outcome is None or outcome.folder is None:
            rows.append((name, entry.state, *("",) * 3, "" if outcome is None else clock_text(outcome.seconds)))
            continue
        mean = f"{outcome.divergence[0].kl_mean:.5f}" if outcome.divergence else ""
        size = size_text(outcome.bytes, like=0)
        rows.append((name, entry.state, f"{outcome.bits_stored:.3f}", size, mean, clock_text(outcome.seconds)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{_name(entry.options)}: {entry.problem}" for entry in entries if entry.problem]
    return "\n".join(lines)


def _facts(entry: _Entry) -> dict[str, object]:
    facts: dict[str, object] = {"folder": str(entry.options.out), "state": entry.state}
    return {**facts, "problem": entry.problem} if entry.problem else facts
