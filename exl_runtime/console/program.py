"""A command line from its first argument to its exit code: signals, log records, and what becomes of errors.

Exit codes: 0 done; 1 a bug in this program; 2 something the user can fix; 130 interrupted; 141 the reader of our
output went away.
"""

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from ..errors import ExlError, OutOfMemory, UsageError
from .progress import Reporter, choose_reporter, printable, printable_lines, write_error

BUG, USER_ERROR, INTERRUPTED, NO_READER = 1, 2, 130, 141


class StrictParser(ArgumentParser):
    """Errors as everywhere in the program: one short message, exit code 2."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(*arguments, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing: whoever runs the program prints."""
        raise UsageError(message, hint=f"{self.prog} --help shows what it takes")


def run_program(
    program: str,
    argv: Sequence[str] | None,
    make_parser: Callable[[str], ArgumentParser],
    work: Callable[[Any, Reporter], int],
    *,
    interrupted: Callable[[], str] = lambda: "interrupted",
    logged: Sequence[str] = (),
) -> int:
    """Parse, run `work(arguments, reporter)`, return its exit code; tell errors as one short message each.

    program      `convert`: called as `python -m convert` or `exl convert`; the parser gets that as its prog
    make_parser  its result has `quiet`, `json` and `verbose` among its options
    interrupted  what to say after Ctrl-C or SIGTERM
    logged       loggers whose records are shown among the progress, beside those of the runtime
    Without arguments the help is printed. Nothing but a bug shows a traceback, and that only with -v.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    _tolerant_output()
    called = sys.argv[0] if sys.argv else ""
    parser = make_parser(called if called.startswith("exl ") else f"python -m {program}")
    verbose = any(text == "--verbose" or (text[:2] == "-v" and set(text[1:]) == {"v"}) for text in given)
    reporter: Reporter | None = None
    with _termination():
        try:
            args = parser.parse_args(given)
            if not given:
                parser.print_help()
                return 0
            reporter = choose_reporter(program, quiet=args.quiet, json_lines=args.json)
            with _logging(reporter, args.verbose, (program, *logged)):
                code = work(args, reporter)
            sys.stdout.flush()
            return code
        except SystemExit as err:  # argparse, after --help
            return err.code if isinstance(err.code, int) else 0
        except BrokenPipeError:
            silence_stdout()
            return NO_READER
        except KeyboardInterrupt:
            kind, message, code = "Interrupted", interrupted(), INTERRUPTED
        except Exception as err:
            if verbose:
                traceback.print_exc()
            message, code = _explained(err, verbose)
            kind = type(err).__name__
        return _told(program, reporter, kind, message, code)


def out_of_memory(err: BaseException) -> OutOfMemory | None:
    """The user-facing error when `err` is what Python or torch raise for want of memory; None for anything else."""
    if isinstance(err, MemoryError):
        return OutOfMemory("out of memory", hint="fewer --rows or a smaller --length need less")
    # torch's own class for a GPU; for the CPU it has none.
    if isinstance(err, RuntimeError) and (
        type(err).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(err)
    ):
        first = printable(str(err).split("\n")[0], 200)
        return OutOfMemory(f"out of memory: {first}", hint="a smaller --length, or --device cpu on a GPU, needs less")
    return None


def silence_stdout() -> None:
    """Nobody reads any more: keep the interpreter from complaining when it flushes at exit."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _explained(err: Exception, verbose: bool) -> tuple[str, int]:
    """(message, exit code)"""
    err = out_of_memory(err) or err
    if isinstance(err, ExlError):
        return str(err), USER_ERROR
    if isinstance(err, OSError):
        return f"{err.strerror or err}{'' if err.filename is None else f': {err.filename}'}", USER_ERROR
    hint = "" if verbose else "\n  hint: the same command with -v shows where it happened; finished work is kept"
    what = printable(f"{type(err).__name__}: {err}")
    return f"this is a bug in exl-runtime, please report it: {what}{hint}", BUG


def _told(program: str, reporter: Reporter | None, kind: str, message: str, code: int) -> int:
    try:
        if reporter is not None:
            reporter.failed(kind, message)
    except OSError:
        silence_stdout()
    write_error(program, printable_lines(message))
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
def _logging(reporter: Reporter, verbose: int, logged: Sequence[str]) -> Iterator[None]:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    loggers = [logging.getLogger(name) for name in dict.fromkeys((*logged, "exl_runtime", "ext"))]
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


def _tolerant_output() -> None:
    """Never die of an encoding: paths and texts may hold what the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # None or another object; closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
