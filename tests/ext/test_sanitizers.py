"""The CPU kernels under the address, undefined-behaviour and thread sanitizers, against plain loops in double.

The programs are in tests/native_checks; each checks its results itself and prints the first one that is wrong.
"""

from pathlib import Path

import pytest
from sanitize import ADDRESS, CHECKS, THREAD, Bench, Sanitizer, Unavailable, open_bench

PROGRAMS = [*sorted(CHECKS.glob("*.cpp")), Path(__file__).resolve().parent / "threads_check.cpp"]


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
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)
def test_memory_and_arithmetic(source: Path, address: Bench) -> None:
    run(address, source)


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)
def test_threads(source: Path, thread: Bench) -> None:
    run(thread, source, "threads")
