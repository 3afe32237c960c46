"""What came out: rows per category with intervals, the protocol line, text, facts, and a JSON line per task."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..tables import NONE, Table, left, number, right
from . import bootstrap, corpus, sandbox
from .asking import BATCH, Conversation, Settings
from .judging import Judge, Judgement, corpus_row
from .suite import Suite, Task, rank

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime

OVERALL = "overall"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A task that was asked and judged."""

    task: Task
    metric: str
    conversations: tuple[Conversation, ...]
    judgement: Judgement

    @property
    def texts(self) -> list[str]:
        """What was judged, per sample."""
        return [one.verdict_text for one in self.conversations]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table. score and interval: shares 0 to 1, BLEU and chrF 0 to 100, own metrics in their unit."""

    category: str
    metric: str
    n: int
    score: float
    interval: bootstrap.Interval | None
    signature: str = ""


def rows(answered: Sequence[Answered], seed: int) -> list[Row]:
    """One row per category and metric in the order of the suite, then the overall ones.

    Overall is the mean over tasks, whatever their category; BLEU and chrF stay apart from it, as corpus scores.
    """
    groups: dict[tuple[str, str], list[Answered]] = {}
    for one in answered:
        groups.setdefault((one.task.category, one.metric), []).append(one)
    result = [_row(category, metric, group, seed) for (category, metric), group in groups.items()]
    if len(result) < 2:
        return result
    shares = [one for one in answered if one.metric not in corpus.NAMES]
    if len([row for row in result if row.metric not in corpus.NAMES]) > 1:
        names = {one.metric for one in shares}
        result.append(_row(OVERALL, names.pop() if len(names) == 1 else "mean", shares, seed))
    for name in corpus.NAMES:
        if len([row for row in result if row.metric == name]) > 1:
            result.append(_row(OVERALL, name, [one for one in answered if one.metric == name], seed))
    return result


def protocol(runtime: "Runtime", suite: Suite, judge: Judge, settings: Settings, asked: Sequence[Task]) -> str:
    """One line: everything a score depends on besides the model."""
    parts = [
        f"suite {suite.name} (sha256 {suite.sha256[:12]}), {len(asked)} task{'' if len(asked) == 1 else 's'}",
        "the model's chat template"
        if runtime.template is not None
        else "plain prompts (the model has no chat template)",
        sampling_text(settings),
        f"at most {settings.max_tokens} tokens where a task sets no limit, batches of {BATCH}",
    ]
    metrics = {judge.metric_of(task) for task in asked}
    if any(rank(name) is not None for name in metrics):
        parts.append(f"code in a process of its own ({judge.limits}; {isolation_text()})")
    parts.append(
        f"95 % intervals: percentile bootstrap, tasks drawn anew {bootstrap.RESAMPLES} times, seed {settings.seed}"
    )
    return "; ".join(parts)


def sampling_text(settings: Settings) -> str:
    """How replies are drawn, in words."""
    if settings.temperature == 0:
        return "greedy"
    plural = "s" if settings.samples > 1 else ""
    return (
        f"temperature {settings.temperature:g} and no cut, {settings.samples} sample{plural} a task, "
        f"seed {settings.seed}"
    )


def isolation_text() -> str:
    """How strong the walls around code are."""
    if sandbox.isolation():
        return "no network, disks read-only, by namespaces of the kernel"
    return "WEAK isolation: no namespaces here, network and disks are refused inside Python only"


def text(model: str, line: str, table_rows: Sequence[Row], notes: Sequence[str]) -> str:
    """What people read. `line`: of `protocol`; `notes`: more lines below."""
    table = Table([left("category"), left("metric"), right("score"), right("95 % interval"), right("tasks")])
    for row in table_rows:
        scale, spec = _unit(row.metric)
        table.add(row.category, row.metric, number(row.score * scale, spec), _bounds(row), str(row.n))
    signatures = dict.fromkeys(f"{row.metric}: sacrebleu {row.signature}" for row in table_rows if row.signature)
    lines = [model, f"protocol: {line}", "", table.text(), "", *signatures]
    if any(":" not in row.metric for row in table_rows):
        lines.append(
            "scores in percent; an interval is left out where one task, or the same score everywhere, gives none"
        )
    return "\n".join([*lines, *notes])


def facts(table_rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for programs; scores as in `Row`, low and high null where there is no interval."""
    return [
        {
            "category": row.category,
            "metric": row.metric,
            "score": row.score,
            "low": None if row.interval is None or row.interval.degenerate else row.interval.low,
            "high": None if row.interval is None or row.interval.degenerate else row.interval.high,
            "n": row.n,
            "signature": row.signature or None,
        }
        for row in table_rows
    ]


def lines(answered: Sequence[Answered]) -> Iterator[bytes]:
    """A JSON line per task: what was asked, said and scored."""
    for one in answered:
        record = {
            "id": one.task.id,
            "category": one.task.category,
            "metric": one.metric,
            "score": one.judgement.score,
            "turns": list(one.task.turns),
            "answers": list(one.task.answers),
            "samples": [
                {
                    "replies": conversation.replies,
                    "judged": conversation.verdict_text,
                    "score": one.judgement.samples[i] if one.judgement.samples else None,
                    "note": conversation.error or one.judgement.notes[i],
                    "stop_reason": conversation.stop_reason,
                    "tokens": conversation.tokens,
                }
                for i, conversation in enumerate(one.conversations)
            ],
        }
        yield json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def settings_facts(settings: Settings) -> dict[str, Any]:
    """For programs."""
    return {**asdict(settings), "batch": BATCH}


def _row(category: str, metric: str, group: Sequence[Answered], seed: int) -> Row:
    if metric in corpus.NAMES:
        whole = corpus_row(metric, group, seed)
        interval, score, signature = whole.interval, whole.score, f"{whole.signature}, {whole.resamples} resamples"
    else:
        scores = [one.judgement.score or 0.0 for one in group]
        interval, score, signature = bootstrap.of_mean(scores, seed), sum(scores) / len(scores), ""
    return Row(category=category, metric=metric, n=len(group), score=score, interval=interval, signature=signature)


def _unit(metric: str) -> tuple[float, str]:
    """(factor, format) for people."""
    if ":" in metric:
        return 1.0, ".4f"
    return (1.0, ".2f") if metric in corpus.NAMES else (100.0, ".1f")


def _bounds(row: Row) -> str:
    if row.interval is None or row.interval.degenerate:
        return NONE
    scale, spec = _unit(row.metric)
    return f"{number(row.interval.low * scale, spec)} to {number(row.interval.high * scale, spec)}"
