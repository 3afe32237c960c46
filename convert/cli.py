"""The command line of the quantizer: which job, how it is shown, and what becomes of errors.

Imports nothing heavy: `--help` must be instant. Exit codes are those of `exl`: 0 done; 1 a bug in this program; 2
something the user can fix; 130 interrupted; 141 the reader of our output went away.
"""

import argparse
import logging
import math
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from exl_runtime.errors import ConvertError, ExlError, OutOfMemory, UsageError

from .arguments import build_parser
from .options import JobOptions, differences, load_job, size_text, spelling, validated, work_folder
from .progress import Reporter, choose_reporter, clock_text, printable, printable_lines, write_error

if TYPE_CHECKING:
    from .job import Outcome

BUG, USER_ERROR, INTERRUPTED, NO_READER = 1, 2, 130, 141
LOGGERS = ("exl_runtime", "convert", "ext")
_JOB_FIELDS = frozenset(field.name for field in fields(JobOptions))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code. Prints what went wrong as one short message; lets nothing but bugs pass
    with a traceback, and that only with -v.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    _tolerant_streams()
    called = sys.argv[0] if sys.argv else ""
    parser = build_parser(called if called.startswith("exl ") else "python -m convert")
    verbose = any(text == "--verbose" or (text[:2] == "-v" and set(text[1:]) == {"v"}) for text in given)
    reporter: Reporter | None = None
    place: list[Path] = []  # the work folder, once known
    with _termination():
        try:
            args = parser.parse_args(given)
            if not given:
                parser.print_help()
                return 0
            reporter = choose_reporter(quiet=args.quiet, json_lines=args.json)
            with _logging(reporter, args.verbose):
                code = _run(args, reporter, place)
            sys.stdout.flush()
            return code
        except SystemExit as err:  # argparse, after --help
            return err.code if isinstance(err.code, int) else 0
        except BrokenPipeError:
            _silence_stdout()
            return NO_READER
        except KeyboardInterrupt:
            where = place[0] if place else "DIR"
            message = f"interrupted; the same command, or --resume {where}, goes on where it stopped"
            kind, code = "Interrupted", INTERRUPTED
        except Exception as err:
            if verbose:
                traceback.print_exc()
            message, code = _explained(err, verbose)
            kind = type(err).__name__
        return _told(reporter, kind, message, code)


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


# --- errors and signals ---------------------------------------------------------------------------------------------


def _friendly(work: "Callable[[], Outcome]") -> "Outcome":
    """Call `work`; what a machine's limits raise becomes an ExlError, so that a batch can go on."""
    try:
        return work()
    except MemoryError as err:
        raise OutOfMemory("out of memory", hint="fewer --rows or a smaller --length need less") from err
    except RuntimeError as err:
        # torch's own class for a GPU; for the CPU it has none.
        if type(err).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(err):
            raise
        first = printable(str(err).split("\n")[0], 200)
        raise OutOfMemory(f"out of memory: {first}", hint="fewer --rows, or --device cpu on a GPU, need less") from err
    except BrokenPipeError:
        raise
    except OSError as err:
        where = f"{err.filename}: " if err.filename is not None else ""
        raise ConvertError(f"{where}{err.strerror or err}", hint="the same command goes on where it stopped") from err


def _explained(err: Exception, verbose: bool) -> tuple[str, int]:
    """(message, exit code)"""
    if isinstance(err, ExlError):
        return str(err), USER_ERROR
    if isinstance(err, OSError):
        return f"{err.strerror or err}{'' if err.filename is None else f': {err.filename}'}", USER_ERROR
    hint = "" if verbose else "\n  hint: the same command with -v shows where it happened; finished work is kept"
    what = printable(f"{type(err).__name__}: {err}")
    return f"this is a bug in exl-runtime, please report it: {what}{hint}", BUG


def _told(reporter: Reporter | None, kind: str, message: str, code: int) -> int:
    try:
        if reporter is not None:
            reporter.failed(kind, message)
    except OSError:
        _silence_stdout()
    write_error(printable_lines(message))
    return code


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM ends the work like Ctrl-C. Signals can only be caught in the main thread; elsewhere nothing changes."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: set by another language


class _Handler(logging.Handler):
    """Log records as lines among the bars."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        show = self._reporter.warn if record.levelno >= logging.WARNING else self._reporter.say
        show(self.format(record))


@contextmanager
def _logging(reporter: Reporter, verbose: int) -> Iterator[None]:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers[:] = [_Handler(reporter)]
            logger.setLevel(level)
            logger.propagate = False
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")  # of libraries, about their own affairs
            yield
    finally:
        for logger, (handlers, old, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(old)


def _tolerant_streams() -> None:
    """Never die of an encoding: paths and texts may hold what the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # None or another object; closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _silence_stdout() -> None:
    """Nobody reads any more: keep the interpreter from complaining when it flushes at exit."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
