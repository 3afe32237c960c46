"""The command line of the quantizer: which job, how it is shown, and what becomes of errors.

Imports nothing heavy: `--help` must be instant. Exit codes are those of `exl`, see `exl_runtime/console/program.py`.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl_runtime.console.program import out_of_memory, run_program
from exl_runtime.console.progress import Reporter, clock_text
from exl_runtime.console.sizes import size_text
from exl_runtime.errors import ConvertError, UsageError

from .arguments import build_parser
from .options import JobOptions, differences, load_job, spelling, validated, work_folder

if TYPE_CHECKING:
    from .job import Outcome

_JOB_FIELDS = frozenset(field.name for field in fields(JobOptions))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code. See `run_program`."""
    place: list[Path] = []  # the work folder, once known

    def interrupted() -> str:
        where = place[0] if place else "DIR"
        return f"interrupted; the same command, or --resume {where}, goes on where it stopped"

    return run_program(
        "convert", argv, build_parser, lambda args, reporter: _run(args, reporter, place), interrupted=interrupted
    )


def _run(args: argparse.Namespace, reporter: Reporter, place: list[Path]) -> int:
    given = {name: value for name, value in vars(args).items() if name in _JOB_FIELDS}
    if "calibration" in given:
        given["calibration"] = tuple(given["calibration"])
    resumed, batch = getattr(args, "resume", None), getattr(args, "batch", None)
    if batch is not None:
        if resumed is not None or given:
            other = "--resume" if resumed is not None else f"--{spelling(next(iter(given)))}"
            raise UsageError(f"--batch and {other} exclude each other", hint="options of jobs belong into the file")
        return _run_batch(batch, reporter, place)
    if resumed is not None:
        place.append(resumed)
        options = _resumed_options(resumed, given)
        from .job import resume

        _show(_friendly(lambda: resume(resumed, reporter, options)), reporter)
        return 0
    if "source" not in given:
        raise UsageError("the folder of the model is missing", hint="give it with -i")
    options = validated(JobOptions(**given))
    place.append(work_folder(options))
    from .job import run

    _show(_friendly(lambda: run(options, reporter)), reporter)
    return 0


def _run_batch(path: Path, reporter: Reporter, place: list[Path]) -> int:
    from .batch import read_batch, run_batch

    jobs = read_batch(path)
    from .job import run

    def run_one(options: JobOptions) -> "Outcome":
        place[:] = [work_folder(options)]
        outcome = _friendly(lambda: run(options, reporter))
        _show(outcome, reporter)
        return outcome

    return run_batch(jobs, run_one, reporter)


def _resumed_options(work: Path, given: dict[str, Any]) -> JobOptions | None:
    """What --resume goes on with: None, the options it was started with, or these with others that change no result."""
    if not given:
        return None
    if "work" in given:
        raise UsageError("--work and --resume exclude each other", hint="--resume DIR names the work folder")
    started = load_job(work)
    options = replace(started, **given)
    if changed := differences(started, options):
        raise UsageError(
            f"{work}: the job was started with other options: {'; '.join(changed)}",
            hint="leave these options out, or start another job with another --work",
        )
    return validated(options)


# --- the end of a job -----------------------------------------------------------------------------------------------


def _show(outcome: "Outcome", reporter: Reporter) -> None:
    unsaid = [text for text in outcome.warnings if text not in reporter.warned]
    for text in unsaid:
        reporter.warn(text)
    reporter.result(summary(outcome), facts(outcome))


def summary(outcome: "Outcome") -> str:
    """A few lines for people: where it is, how large, how far from the source."""
    spent = clock_text(outcome.seconds)
    if outcome.folder is None:
        return f"measured in {spent}: {outcome.measurement}\n  use it with --measurement"
    lines = [
        f"{outcome.folder}",
        f"  {outcome.bits_stored:.3f} bits per weight ({outcome.bits_target:.3f} wanted), "
        f"{size_text(outcome.bytes, like=0)}, in {spent}",
    ]
    for text in outcome.divergence:
        lines += [
            f"  on {text.text}, {text.tokens} tokens:",
            f"    KL mean {_number(text.kl_mean, '.5f')}, median {_number(text.kl_median, '.5f')}, "
            f"99 % below {_number(text.kl_p99, '.5f')}; same top token {_number(100 * text.top1, '.2f')} %",
            f"    perplexity {_number(text.perplexity, '.4f')}, the source's {_number(text.source_perplexity, '.4f')}",
        ]
    if outcome.warnings:
        lines.append(f"  {len(outcome.warnings)} warning{'s' if len(outcome.warnings) > 1 else ''}, see the report")
    lines.append(f"  report: {outcome.folder / 'report.md'}")
    return "\n".join(lines)


def facts(outcome: "Outcome") -> dict[str, object]:
    """The same for programs, as JSON values (NaN where something was not measured)."""
    folder = outcome.folder
    return {
        "folder": None if folder is None else str(folder),
        "measurement": None if outcome.measurement is None else str(outcome.measurement),
        "report": None if folder is None else str(folder / "report.json"),
        "bits_stored": outcome.bits_stored,
        "bits_target": outcome.bits_target,
        "bytes": outcome.bytes,
        "seconds": outcome.seconds,
        "divergence": [asdict(entry) for entry in outcome.divergence],
        "warnings": list(outcome.warnings),
    }


def _number(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "n/a"


# --- errors ---------------------------------------------------------------------------------------------------------


def _friendly(work: "Callable[[], Outcome]") -> "Outcome":
    """Call `work`; what a machine's limits raise becomes an ExlError, so that a batch can go on."""
    try:
        return work()
    except (MemoryError, RuntimeError) as err:
        if (explained := out_of_memory(err)) is None:
            raise
        raise explained from err
    except BrokenPipeError:
        raise
    except OSError as err:
        where = f"{err.filename}: " if err.filename is not None else ""
        raise ConvertError(f"{where}{err.strerror or err}", hint="the same command goes on where it stopped") from err
