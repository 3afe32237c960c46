"""Suites of tasks: JSON lines (UTF-8), one task a line. Knows no model and no metric beyond its name.

A line is an object with
    id           text, unique in the suite
    category     text; scores are shown per category                             (default: "all")
    prompt       text: what the user says; or instead of it
    messages     a list of texts: what the user says turn by turn, the model's own replies in between;
                 the last reply counts
    system       text in front of it all
    answer       the answer: text, number or JSON object; or "answers": a list of those, any of which is right
    metric       how replies are judged:
                   em            equal after normalisation (SQuAD)     f1         overlap of words (SQuAD)
                   contains      an answer, normalised, stands in it   number     its last number is the answer
                   json          share of fields that are right        json-valid it holds JSON at all
                   instructions  all of "checks" hold                  pass@K     code passes "tests"
                   bleu, chrf    of the whole category, by sacrebleu
                 Left out: pass@1 with "tests", instructions with "checks", json for an object, number for a number,
                 em for text.
    checks       an object of checks, see below
    tests        Python that raises when the reply's code is wrong; it runs after that code, in one namespace
    tolerance    for "number": how far off is still right                        (default: 0)
    stop         a list of texts that end a reply
    max_tokens   most tokens of a reply                                          (default: --max-tokens)
Any other field is refused, but for "note", which nobody reads. Empty lines are skipped.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl_runtime.config.fields import shown
from exl_runtime.console.progress import printable
from exl_runtime.errors import DataError

from .checks import checked_checks

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).resolve().parent / "builtin"
TEXT_METRICS = ("em", "f1", "contains", "bleu", "chrf")
METRICS = (*TEXT_METRICS, "number", "json", "json-valid", "instructions")
MAX_LINE = 2**24  # bytes
_TEXTS = ("id", "category", "prompt", "system", "metric", "tests", "note")
_FIELDS = (*_TEXTS, "messages", "answer", "answers", "checks", "tolerance", "stop", "max_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One line of a suite. turns: what the user says, in order. answers: any of them is right, as JSON gives them.

    source: the line itself, for metrics of the user's own.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    metric: str
    system: str | None = None
    answers: tuple[Any, ...] = ()
    checks: Mapping[str, Any] = field(default_factory=dict)
    tests: str | None = None
    tolerance: float = 0.0
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """The answers as text; objects and numbers as JSON writes them."""
        return [one if isinstance(one, str) else json.dumps(one) for one in self.answers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """name: as protocols show it. sha256: of the bytes of its file (of its files in order, for the built-in one)."""

    name: str
    sha256: str
    tasks: tuple[Task, ...]


def read_suite(name: str | Path) -> Suite:
    """A suite from a file, or "builtin". Raises DataError that names the file and the line."""
    if str(name) == BUILTIN:
        paths = sorted(BUILTIN_FOLDER.glob("*.jsonl"))
    else:
        paths = [Path(name)]
    digest, tasks, seen = hashlib.sha256(), [], {}
    for path in paths:
        data = _read(path)
        digest.update(data)
        for where, task in _tasks(data, path):
            if task.id in seen:
                raise DataError(f'{where}: the id "{printable(task.id, 60)}" is taken ({seen[task.id]})')
            seen[task.id] = where.rsplit(": ", 1)[-1]
            tasks.append(task)
    if not tasks:
        raise DataError(f"{name}: no tasks in it", hint="write one JSON object a line, see `--help`")
    return Suite(name=BUILTIN if str(name) == BUILTIN else paths[0].name, sha256=digest.hexdigest(), tasks=tuple(tasks))


def limited(suite: Suite, limit: int | None) -> Suite:
    """The first `limit` tasks of every category; None: all. The hash stays that of the whole suite."""
    if limit is None:
        return suite
    taken: Counter[str] = Counter()
    kept = []
    for task in suite.tasks:
        taken[task.category] += 1
        if taken[task.category] <= limit:
            kept.append(task)
    return Suite(name=suite.name, sha256=suite.sha256, tasks=tuple(kept))


def rank(metric: str) -> int | None:
    """k of "pass@k"; None for any other metric."""
    head, _, tail = metric.partition("@")
    # 9 digits: more samples than anyone draws, and int() refuses thousands of them
    valid = head == "pass" and tail.isascii() and tail.isdigit() and len(tail) <= 9 and int(tail) > 0
    return int(tail) if valid else None


def lacking(task: Task, metric: str) -> str | None:
    """What `task` does not have for being judged by `metric`, in words; None when it can be."""
    if rank(metric) is not None:
        return None if task.tests is not None else '"tests"'
    if metric == "instructions":
        return None if task.checks else '"checks"'
    if metric == "json-valid" or ":" in metric:
        return None
    if not task.answers:
        return '"answer" or "answers"'
    if metric == "number":
        whole = all(_is_number(one) for one in task.answers)
        return None if whole else "a number as its answer"
    if metric in TEXT_METRICS:
        return None if all(isinstance(one, str) for one in task.answers) else "text as its answer"
    return None if all(isinstance(one, dict) for one in task.answers) else "a JSON object as its answer"


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", hint=f"give a file of tasks, or `{BUILTIN}`") from None
    except (OSError, ValueError) as err:  # ValueError: a zero byte in the name
        raise DataError(f"{path}: cannot be read: {getattr(err, 'strerror', None) or err}") from err
    if not data.strip():
        raise DataError(f"{path}: the file is empty", hint="write one JSON object a line, see `--help`")
    return data


def _tasks(data: bytes, path: Path) -> Iterator[tuple[str, Task]]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            raise DataError(f"{where}: longer than {MAX_LINE} bytes")
        try:
            # "NaN" and "Infinity" are Python's own additions to JSON.
            record = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        except UnicodeDecodeError as err:
            raise DataError(f"{where}: not UTF-8 text: {err.reason}") from err
        except (ValueError, RecursionError) as err:
            reason = err.msg if isinstance(err, json.JSONDecodeError) else str(err) or "nested too deeply"
            raise DataError(f"{where}: not valid JSON: {reason}") from err
        yield where, _task(record, where)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a value of JSON")


def _task(record: object, where: str) -> Task:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a task is an object, not {shown(record)}")
    for name in record:
        if name not in _FIELDS:
            raise DataError(f"{where}: unknown field {shown(name)}", hint=f"known: {', '.join(_FIELDS)}")
    for name in _TEXTS:
        if name in record and (not isinstance(record[name], str) or not record[name].strip()):
            raise DataError(f'{where}: "{name}" must be a text, is {shown(record[name])}')
    if "id" not in record:
        raise DataError(f'{where}: no "id"')
    answers = _answers(record, where)
    task = Task(
        id=record["id"],
        category=record.get("category", "all"),
        turns=_turns(record, where),
        metric=record.get("metric") or _default_metric(record, answers),
        system=record.get("system"),
        answers=answers,
        checks=checked_checks(record["checks"], where) if "checks" in record else {},
        tests=record.get("tests"),
        tolerance=_tolerance(record.get("tolerance", 0), where),
        stop=tuple(_texts(record["stop"], "stop", where)) if "stop" in record else (),
        max_tokens=_max_tokens(record.get("max_tokens"), where),
        source=record,
    )
    if task.metric not in METRICS and rank(task.metric) is None:
        hint = f"known: {', '.join(METRICS)}, pass@K"
        if ":" in task.metric:
            hint = "a metric of your own goes with --metric: files of tasks may not name code to run"
        raise DataError(f"{where}: unknown metric {shown(task.metric)}", hint=hint)
    if missing := lacking(task, task.metric):
        raise DataError(f'{where}: the metric "{task.metric}" needs {missing}')
    if task.tests is not None:
        try:
            compile(task.tests, "tests", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
            raise DataError(f'{where}: "tests" is not Python: {err}') from err
    return task


def _turns(record: dict[str, Any], where: str) -> tuple[str, ...]:
    if ("prompt" in record) == ("messages" in record):
        what = "both" if "prompt" in record else "neither"
        raise DataError(f'{where}: {what} of "prompt" and "messages"; give one of them')
    return (record["prompt"],) if "prompt" in record else tuple(_texts(record["messages"], "messages", where))


def _texts(value: object, name: str, where: str) -> list[str]:
    if not isinstance(value, list) or not value or any(not isinstance(one, str) or not one for one in value):
        raise DataError(f'{where}: "{name}" must be a list of texts that are not empty, is {shown(value)}')
    return value


def _answers(record: dict[str, Any], where: str) -> tuple[Any, ...]:
    if "answer" in record and "answers" in record:
        raise DataError(f'{where}: both of "answer" and "answers"; give one of them')
    answers = [record["answer"]] if "answer" in record else record.get("answers", [])
    if not isinstance(answers, list) or ("answers" in record and not answers):
        raise DataError(f'{where}: "answers" must be a list with at least one answer, is {shown(answers)}')
    for one in answers:
        if not isinstance(one, str | dict) and not _is_number(one):
            raise DataError(f"{where}: an answer is a text, a number or an object, not {shown(one)}")
        if isinstance(one, str) and not one.strip():
            raise DataError(f"{where}: an answer is an empty text")
    return tuple(answers)


def _default_metric(record: dict[str, Any], answers: tuple[Any, ...]) -> str:
    if "tests" in record:
        return "pass@1"
    if "checks" in record:
        return "instructions"
    first = answers[0] if answers else ""
    return "json" if isinstance(first, dict) else "em" if isinstance(first, str) else "number"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tolerance(value: object, where: str) -> float:
    if not _is_number(value) or value < 0:  # type: ignore[operator]
        raise DataError(f'{where}: "tolerance" must be a number from 0 up, is {shown(value)}')
    return float(value)  # type: ignore[arg-type]


def _max_tokens(value: object, where: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f'{where}: "max_tokens" must be a whole number from 1 up, is {shown(value)}')
    return value
