"""`eval tasks`: a suite of questions with answers, asked of a model."""

import argparse
import math
from pathlib import Path

from exl_runtime.console.progress import Progress
from exl_runtime.errors import StorageError, UsageError

from ..opening import add_loading, add_model, open_model, positive
from ..outcome import Outcome
from ..tasks import checks, suite

HELP = "ask a suite of tasks and score the replies: answers, JSON, arithmetic, instructions, recall, code"
USAGE = "MODEL [--suite builtin|FILE] [--metric NAME] [--limit N] [--samples N] [-o FILE] ..."
_FORMAT, _CHECKS = (module.__doc__.split("\n\n", 1)[1] for module in (suite, checks))
EPILOG = f"a suite is a file of JSON lines (UTF-8), one task a line\n\n{_FORMAT}\n{_CHECKS}".replace("%", "%%")


def add(parser: argparse.ArgumentParser) -> None:
    """See the package."""
    add_model(parser)
    group = parser.add_argument_group("what is asked, and how it is judged")
    group.add_argument(
        "--suite", default=suite.BUILTIN, metavar="FILE", help="JSON lines, see below; or `builtin` (default: builtin)"
    )
    group.add_argument(
        "--metric",
        metavar="NAME",
        help="one metric for all tasks: em, f1, contains, number, json, json-valid, instructions, bleu, chrf, pass@K, "
        "or module:function, a function(prediction, answers, task) -> float (default: the metric of each task)",
    )
    group.add_argument("--limit", type=positive, metavar="N", help="at most N tasks of every category")
    group.add_argument(
        "--allow-code",
        action="store_true",
        help="run the code that the model writes, in a confined process; without it tasks with pass@K are left out",
    )
    group = parser.add_argument_group("replies")
    group.add_argument("--samples", type=positive, default=1, metavar="N", help="replies to each task (default: 1)")
    group.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0 is greedy (default: 0); no other cut is made",
    )
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="of draws and of intervals (default: 0)")
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=256,
        metavar="N",
        help="of a reply, where a task sets none (default: 256)",
    )
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help="a JSON line per task: asked, said, scored")
    add_loading(parser)


def run(args: argparse.Namespace, progress: Progress) -> Outcome:
    """See the package."""
    from ..tasks import judging

    if args.samples > 1 and args.temperature == 0:
        raise UsageError(
            f"--samples {args.samples} without a temperature gives the same reply every time", hint=_HOTTER
        )
    if args.output is not None:
        _require_place(args.output)
    whole = suite.read_suite(args.suite)
    judge = judging.make_judge(args.metric, allow_code=args.allow_code)
    tasks, left_out = judging.chosen_tasks(suite.limited(whole, args.limit), judge, args.samples)
    for line in left_out:
        progress.warn(line)
    # After what is quick to check: the arguments and the suite.
    from exl_runtime.files import write_pieces

    from ..tasks import asking, results

    settings = asking.Settings(
        samples=args.samples, temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens
    )
    answered: list[results.Answered] = []
    partial = False
    with open_model(args.model, args, progress) as runtime:
        line = results.protocol(runtime, whole, judge, settings, tasks)
        model = f"{runtime.info.name}: {runtime.info.format}, {runtime.info.bits_per_weight:.2f} bits per weight"
        if args.allow_code and not results.sandbox.isolation():
            progress.warn(f"code of the model: {results.isolation_text()}")
        try:
            with progress.stage("tasks", len(tasks), "tasks") as stage:
                for conversations in asking.ask(runtime, tasks, settings):
                    task = conversations[0].task
                    judgement = judge.judge(task, [one.verdict_text for one in conversations])
                    answered.append(
                        results.Answered(
                            task=task,
                            metric=judge.metric_of(task),
                            conversations=tuple(conversations),
                            judgement=judgement,
                        )
                    )
                    stage.advance(1, task.category)
        except KeyboardInterrupt:
            if not answered:
                raise
            partial = True
    if args.output is not None:
        write_pieces(args.output, results.lines(answered))
    rows = results.rows(answered, args.seed)
    notes = _notes(answered, left_out, partial, len(tasks))
    if args.output is not None:
        notes.append(f"replies: {args.output}")
    return Outcome(
        text=results.text(model, line, rows, notes),
        facts={
            "model": str(args.model),
            "suite": {"name": whole.name, "sha256": whole.sha256, "tasks": len(whole.tasks)},
            "protocol": line,
            "settings": results.settings_facts(settings),
            "rows": results.facts(rows),
            "left_out": left_out,
            "asked": len(answered),
            "partial": partial,
            "output": None if args.output is None else str(args.output),
        },
        code=130 if partial else 0,
    )


_HOTTER = "add --temperature, say 0.8, or leave --samples out"


def _notes(answered: list, left_out: list[str], partial: bool, wanted: int) -> list[str]:
    notes = list(left_out)
    unfit = sum(any(one.error is not None for one in each.conversations) for each in answered)
    if unfit:
        notes.append(f"{unfit} of them do not fit the context of the model and count as empty replies")
    cut = sum(any(one.stop_reason in ("length", "context") for one in each.conversations) for each in answered)
    if cut:
        notes.append(f"in {cut} of them a reply was cut at its most tokens")
    if partial:
        notes.insert(0, f"PARTIAL: interrupted after {len(answered)} of {wanted} tasks")
    return notes


def _require_place(path: Path) -> None:
    """Before an hour of work, not after it."""
    if path.is_dir():
        raise StorageError(f"{path}: a folder; -o names a file", hint=f"-o {path / 'results.jsonl'}")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"{path}: its folder does not exist", hint=f"mkdir -p {path.absolute().parent}")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 100")
    return value


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)
