"""Builds what some tests need while others run: a cold run of the whole suite compiles for minutes, and the tests
themselves keep one CPU busy.

A module named in QUEUE has `build_ahead()`: the builds, as functions, that its tests ask for. Its tests run after all
others; they call the same functions of `kept`, so that they find a result, wait for it, or make it themselves. A build
that fails here is tried again by the test, which then has the compiler's words.

    python tests/ahead.py ROOT MODULE...      runs until everything is built, or until its standard input ends
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

# In the order in which they are built and then tested. What only has to compile comes last: by then the programs of
# the others can run beside it.
QUEUE = (
    "tests/cuda/conftest.py",  # has no tests: the emulated library, of use to the whole folder
    "tests/ext/test_sanitizers.py",
    "tests/cuda/test_sanitizers.py",
    "tests/cuda/test_planted.py",
    "tests/cuda/test_compile.py",
)
WORTH_IT = 500  # other tests, behind which builds can hide
NICENESS = 10


def place(root: Path, file: Path) -> int:
    """Where the tests of a file come: 0 for most."""
    try:
        return 1 + QUEUE.index(file.relative_to(root).as_posix())
    except ValueError:
        return 0


def wanted(root: Path, files: Iterable[Path]) -> list[str]:
    """What to build ahead for one test in each of `files`: all that is asked for if many others run, else nothing."""
    files = list(files)
    if sum(place(root, file) == 0 for file in files) < WORTH_IT:
        return []
    needed = {*files, *(file.with_name("conftest.py") for file in files)}
    return [name for name in QUEUE if root / name in needed]


def start(root: Path, modules: Iterable[str]) -> "subprocess.Popen[bytes]":
    """A process that builds. It ends when `stop` is called, and when this process dies."""
    command = [sys.executable, str(Path(__file__).resolve()), str(root), *modules]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, cwd=root)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End it, its compilers included."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()


def build(steps: Iterable[Callable[[], object]], jobs: int) -> None:
    """Run all steps, the first ones first; what fails or skips is left to the tests."""
    with ThreadPoolExecutor(jobs) as pool:
        wait([pool.submit(step) for step in steps])


def steps_of(root: Path, modules: Iterable[str]) -> list[Callable[[], object]]:
    """All builds that the modules ask for."""
    steps: list[Callable[[], object]] = []
    for number, name in enumerate(modules):
        spec = importlib.util.spec_from_file_location(f"ahead_{number}", root / name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        with contextlib.suppress(Exception, pytest.skip.Exception):  # then its tests say why
            steps += module.build_ahead()
    return steps


def _end_with_standard_input() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os.killpg(0, signal.SIGKILL)


def main(root: Path, modules: list[str]) -> None:
    os.setpgid(0, 0)  # can be ended as one; not a session, since niceness counts within those on some systems
    os.nice(NICENESS)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    sys.path[:0] = [str(root), str(root / "tests")]
    from ext.toolchain import parallel_jobs

    build(steps_of(root, modules), parallel_jobs())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
