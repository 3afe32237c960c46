"""From replies to scores: which function judges what, and what a task's score is over its samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from exl_runtime.errors import UsageError

from . import answers, checks, code, corpus, objects, sandbox
from .custom import Metric, apply, load_metric
from .suite import METRICS, Suite, Task, lacking, rank

_TEXT = {"em": answers.exact_match, "f1": answers.f1, "contains": answers.contains}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """score: of the task, the mean of its samples (pass@k: the estimate); None where only a whole category has one.

    samples: one score each; notes: one word or sentence each, "" for nothing to say.
    """

    score: float | None
    samples: tuple[float, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """metric: the one for all tasks, None: that of each. allow_code: whether code of replies is run."""

    metric: str | None = None
    own: Metric | None = None
    allow_code: bool = False
    limits: sandbox.Limits = field(default_factory=sandbox.Limits)

    def metric_of(self, task: Task) -> str:
        """The name of the metric that judges `task`."""
        return self.metric or task.metric

    def judge(self, task: Task, replies: Sequence[str]) -> Judgement:
        """`replies`: the samples of the task. Raises EvalError for a fault in a metric of the user's own."""
        metric = self.metric_of(task)
        notes = [""] * len(replies)
        if metric in corpus.NAMES:
            return Judgement(score=None, samples=(), notes=tuple(notes))
        if (k := rank(metric)) is not None:
            ran = [sandbox.run_code(code.find_code(reply), task.tests or "", self.limits) for reply in replies]
            passed = [float(verdict.passed) for verdict in ran]
            score = code.pass_at_k(len(ran), int(sum(passed)), k)
            return Judgement(score=score, samples=tuple(passed), notes=tuple(verdict.reason for verdict in ran))
        if metric == "instructions":
            found = [checks.verdicts(reply, task.checks) for reply in replies]
            notes = [", ".join(f"not {name}" for name, holds in one.items() if not holds) for one in found]
            samples = tuple(float(all(one.values())) for one in found)
        else:
            samples = tuple(self._one(metric, task, reply) for reply in replies)
        return Judgement(score=sum(samples) / len(samples), samples=samples, notes=tuple(notes))

    def _one(self, metric: str, task: Task, reply: str) -> float:
        if self.own is not None:
            return apply(metric, self.own, reply, task)
        if metric in _TEXT:
            return _TEXT[metric](reply, task.texts)
        if metric == "number":
            return answers.number(reply, task.answers, task.tolerance)
        if metric == "json":
            return objects.field_accuracy(reply, task.answers)
        return objects.valid_json(reply)


def make_judge(metric: str | None, *, allow_code: bool) -> Judge:
    """A judge for `--metric`. Raises UsageError for an unknown name, EvalError when sacrebleu is wanted and absent."""
    if metric is not None and ":" in metric:
        return Judge(metric=metric, own=load_metric(metric), allow_code=allow_code)
    if metric is not None and metric not in METRICS and rank(metric) is None:
        raise UsageError(f"unknown metric {metric!r}", hint=f"known: {', '.join(METRICS)}, pass@K, module:function")
    return Judge(metric=metric, allow_code=allow_code)


def chosen_tasks(suite: Suite, judge: Judge, samples: int) -> tuple[list[Task], list[str]]:
    """The tasks that can be asked and judged, and a line about each group that is left out.

    Raises UsageError when none is left or pass@k has too few samples, EvalError when sacrebleu is wanted and absent.
    """
    kept: list[Task] = []
    left: dict[str, int] = {}
    for task in suite.tasks:
        metric = judge.metric_of(task)
        if missing := lacking(task, metric):
            reason = f"the metric {metric} needs {missing}"
        elif rank(metric) is not None and not judge.allow_code:
            reason = "they run code that the model writes, which needs --allow-code"
        else:
            kept.append(task)
            continue
        left[reason] = left.get(reason, 0) + 1
    lines = [f"{count} task{'s' if count > 1 else ''} left out: {reason}" for reason, count in left.items()]
    if not kept:
        raise UsageError(f"no task of {suite.name} can be judged: {'; '.join(lines)}")
    metrics = {judge.metric_of(task) for task in kept}
    for name in metrics:
        if (k := rank(name)) is not None and k > samples:
            raise UsageError(f"{name} needs at least {k} samples of each task, not {samples}", hint=f"--samples {k}")
    if metrics & set(corpus.NAMES):
        corpus.require_sacrebleu()
    return kept, lines


def corpus_row(name: str, tasks: Sequence[Any], seed: int) -> corpus.CorpusScore:
    """BLEU or chrF over results of tasks, each with `task` and `texts` (what was judged, per sample)."""
    return corpus.corpus_score(name, [one.texts for one in tasks], [one.task.texts for one in tasks], seed)
