"""The CPU kernels under the address, undefined-behaviour and thread sanitizers, against plain loops in double.

The programs are in tests/native_checks; each checks its results itself and prints the first one that is wrong. A worker
thread that touches a guard page dies without a report: all signals are blocked there.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from sanitize import ADDRESS, CHECKS, THREAD, Bench, Sanitizer, Unavailable, open_bench

PROGRAMS = [*sorted(CHECKS.glob("*.cpp")), Path(__file__).resolve().parent / "threads_check.cpp"]


def build_ahead() -> list[Callable[[], object]]:
    steps = []
    for sanitizer in (ADDRESS, THREAD):
        with suppress(Unavailable):
            steps += open_bench(sanitizer).steps(PROGRAMS)
    return steps


def opened(sanitizer: Sanitizer) -> Bench:
    try:
        return open_bench(sanitizer)
    except Unavailable as err:
        pytest.skip(str(err))


@pytest.fixture(scope="module")
def address() -> Bench:
    return opened(ADDRESS)


@pytest.fixture(scope="module")
def thread() -> Bench:
    return opened(THREAD)


def run(bench: Bench, source: Path, *arguments: str) -> None:
    done = bench.start(bench.build(source), *arguments)
    said = "\n".join(done.stdout.splitlines()[-3:])
    assert done.returncode == 0, f"exit code {done.returncode} (negative: a signal) in or after: {said}\n{done.stderr}"


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)
def test_memory_and_arithmetic(source: Path, address: Bench) -> None:
    run(address, source)


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)
def test_threads(source: Path, thread: Bench) -> None:
    run(thread, source, "threads")
