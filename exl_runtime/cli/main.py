"""The command line: which command, and what becomes of errors. Imports nothing heavy; `exl --help` needs no torch.

Exit codes: 0 done; 1 a bug in this program, or `doctor` found something wrong; 2 something the user can fix;
130 interrupted; 141 the reader of our output went away.
"""

import argparse
import contextlib
import errno
import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from .. import __version__
from ..console.program import BUG, INTERRUPTED, NO_READER, USER_ERROR, StrictParser, silence_stdout
from ..console.terminal import clean_line, clean_message, tolerant_streams
from ..errors import ExlError
from . import chat, doctor, forward, info, run, serve

COMMANDS = {"chat": chat, "run": run, "serve": serve, "info": info, "doctor": doctor}
DESCRIPTION = "Local chat with EXL2, GPTQ and plain safetensors models, on a GPU or on a plain CPU."
EPILOG = "exl chat                     talk to the bundled toy model\nexl chat path/to/model       talk to a real one"
OUTPUT_LOST = (errno.EBADF, errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT)  # closed, full, gone


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = StrictParser(
        prog="exl", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"exl-runtime {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in COMMANDS.items():
        usage = f"exl {name} {module.USAGE}"
        module.add(commands.add_parser(name, usage=usage, help=module.HELP, description=module.HELP))
    for name, (_, _, text) in forward.PROGRAMS.items():
        commands.add_parser(name, help=text, add_help=False)  # never parsed here, see `main`
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Raises ExlError and whatever else goes wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in forward.PROGRAMS:
        return forward.run(given[0], given[1:])
    parser = build_parser()
    args = parser.parse_args(given)
    if args.command is None:
        parser.print_help()
        return 0
    _configure_logging(args.verbose)
    return COMMANDS[args.command].run(args)


def entry() -> None:
    """The console script: `main` with its errors turned into messages and exit codes."""
    # Importing torch makes a million objects that stay. Looking for garbage among them, again and again while they
    # come and once more at the end, takes a third of the time of a short command. `open_runtime` turns it on again.
    gc.disable()
    code = guarded(main)
    gc.freeze()
    sys.exit(code)


def guarded(program: Callable[..., int], *arguments: object) -> int:
    """Call `program` and turn however it ends into an exit code, with at most one short message on standard error."""
    tolerant_streams()
    try:
        code = _code_of(program, arguments)
        sys.stdout.flush()
        return code
    except ExlError as err:
        return _fail(str(err), USER_ERROR)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        return NO_READER
    except RecursionError as err:
        return _bug(err)
    except MemoryError:
        return _fail("out of memory\n  hint: a shorter --context or a smaller model needs less", USER_ERROR)
    except OSError as err:
        if _debugging():
            traceback.print_exc()
        if err.filename is None and err.errno in OUTPUT_LOST:
            silence_stdout()
            return _fail(f"the output could not be written: {err.strerror}", USER_ERROR)
        where = f": {clean_line(str(err.filename))}" if err.filename is not None else ""
        return _fail(f"{err.strerror or err}{where}", USER_ERROR)
    except Exception as err:
        return _bug(err)


def _code_of(program: Callable[..., int], arguments: Sequence[object]) -> int:
    try:
        return program(*arguments)
    except SystemExit as err:
        if isinstance(err.__context__, BrokenPipeError):  # how rich ends a program whose reader left
            raise err.__context__ from None
        return err.code if isinstance(err.code, int) else 0  # argparse after --help and --version


def _fail(message: str, code: int) -> int:
    if _debugging():
        traceback.print_exc()
    with contextlib.suppress(OSError):  # standard error itself may be full or gone; the exit code remains
        sys.stderr.write(f"exl: {clean_message(message)}\n")
        sys.stderr.flush()
    return code


def _bug(err: BaseException) -> int:
    if _debugging():
        traceback.print_exc()
    what = clean_line(f"{type(err).__name__}: {err}")
    sys.stderr.write(f"exl: this is a bug in exl-runtime, please report it: {what}\n")
    if not _debugging():
        sys.stderr.write("  hint: the same command with -v shows where it happened\n")
    return BUG


def _debugging() -> bool:
    return bool(os.environ.get("EXL_DEBUG")) or any(
        argument == "--verbose" or (argument[:2] == "-v" and set(argument[1:]) == {"v"}) for argument in sys.argv[1:]
    )


class _SafeFormatter(logging.Formatter):
    """Log lines may quote file contents; none of it may reach the terminal as control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return clean_message(super().format(record))


def _configure_logging(verbose: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_SafeFormatter("exl: %(message)s"))
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    for name in ("exl_runtime", "ext"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
    if not verbose:
        warnings.simplefilter("ignore")  # of libraries, about their own affairs
