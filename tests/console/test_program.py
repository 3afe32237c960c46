"""How a command line ends: messages, codes, signals. What commands do with it is tested beside them."""

import argparse
import logging
import os
import signal

import pytest

from exl_runtime.console.program import StrictParser, run_program
from exl_runtime.console.progress import Reporter
from exl_runtime.errors import DataError


def parser(prog: str) -> argparse.ArgumentParser:
    made = StrictParser(prog=prog)
    made.add_argument("--quiet", action="store_true")
    made.add_argument("--json", action="store_true")
    made.add_argument("-v", "--verbose", action="count", default=0)
    return made


def run(work, *arguments: str) -> int:
    return run_program(
        "thing", arguments or ("--quiet",), parser, work, interrupted=lambda: "stopped", logged=("mine",)
    )


def raising(error: BaseException):
    def work(args: argparse.Namespace, reporter: Reporter) -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("no text", hint="give some"), 2, "thing: no text\nthing: hint"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory"),
        (FileNotFoundError(2, "No such file", "a\x1b[2J"), 2, "No such file: a\\x1b[2J"),
        (KeyboardInterrupt(), 130, "thing: stopped"),
        (ZeroDivisionError("x"), 1, "this is a bug in exl-runtime, please report it: ZeroDivisionError: x"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_errors_become_one_message_and_a_code(error, code, words, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(raising(error)) == code
    err = capfd.readouterr().err
    assert words.replace("thing: hint", "  hint") in err and "Traceback" not in err and "\x1b" not in err


def test_a_bug_shows_its_place_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(ZeroDivisionError("x")), "-v") == 1
    assert "Traceback" in capsys.readouterr().err


def test_usage_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(AssertionError()), "--unknown") == 2
    assert "--help shows what it takes" in capsys.readouterr().err
    assert run_program("thing", (), parser, raising(AssertionError())) == 0
    assert "usage: python -m thing" in capsys.readouterr().out
    assert run(raising(AssertionError()), "--help") == 0


def test_a_request_to_end_is_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work(args: argparse.Namespace, reporter: Reporter) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert run(work) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_log_records_of_the_work_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def work(args: argparse.Namespace, reporter: Reporter) -> int:
        logging.getLogger("mine").warning("odd \x1b[1m")
        logging.getLogger("mine").info("chatter")
        return 7

    assert run(work) == 7
    assert capsys.readouterr().err == "thing: warning: odd \\x1b[1m\n"
    assert not logging.getLogger("mine").handlers
