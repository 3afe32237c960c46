"""What is built beside the first tests: when it starts, how it ends, and what a failure does."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import ahead
import pytest
from kept import kept, sweep

pytestmark = pytest.mark.skipif(not hasattr(os, "setpgid"), reason="builds ahead need process groups")

MODULE = """
import os, subprocess, sys, time
from pathlib import Path
HERE = Path(__file__).parent

def fail():
    raise RuntimeError("does not build")

def forever():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (HERE / "pid.part").write_text(f"{child.pid} {os.nice(0)}")
    os.replace(HERE / "pid.part", HERE / "pid")
    child.wait()

def build_ahead():
    return [fail, forever]
"""


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # whoever inherited it may not have looked yet


def test_the_queue_names_modules_that_build(repo: Path) -> None:
    for name in ahead.QUEUE:
        assert "\ndef build_ahead() -> " in (repo / name).read_text(encoding="utf-8"), name


def test_nothing_is_built_for_a_few_files(repo: Path) -> None:
    slow, quick = [repo / name for name in ahead.QUEUE], repo / "tests" / "cuda" / "test_ptx.py"
    assert ahead.wanted(repo, slow * ahead.WORTH_IT) == []
    assert ahead.wanted(repo, [*slow, *[quick] * (ahead.WORTH_IT - 1)]) == []
    assert ahead.wanted(repo, [*slow, *[quick] * ahead.WORTH_IT]) == list(ahead.QUEUE)
    assert ahead.wanted(repo, [quick] * ahead.WORTH_IT) == ["tests/cuda/conftest.py"]
    assert ahead.wanted(repo, [repo / "tests" / "ops" / "test_norm.py"] * ahead.WORTH_IT) == []


def test_what_is_built_ahead_is_tested_last(repo: Path) -> None:
    places = [ahead.place(repo, repo / name) for name in ("tests/test_tree.py", *ahead.QUEUE)]
    assert places == list(range(len(ahead.QUEUE) + 1))


def test_the_end_takes_compilers_along_and_a_failure_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def build_ahead():\n    raise OSError('no compiler')\n")
    process = ahead.start(tmp_path, ["broken.py", "module.py"])
    try:
        until((tmp_path / "pid").exists)
        compiler, niceness = map(int, (tmp_path / "pid").read_text().split())
        assert running(compiler) and process.poll() is None
    finally:
        ahead.stop(process)
    until(lambda: not running(compiler))
    assert niceness == min(19, os.nice(0) + ahead.NICENESS)


def test_a_file_is_made_once(tmp_path: Path) -> None:
    made = []

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.2)
        path.write_text("whole")

    target = tmp_path / "object.o"
    threads = [threading.Thread(target=kept, args=(target, make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and target.read_text() == "whole" and made[0] != target


def test_what_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    target = tmp_path / "object.o"

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("error: expected ';'")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected"):
            kept(target, fail)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_old_files_go(tmp_path: Path) -> None:
    for name, days in (("old", 15), ("new", 13)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    sweep(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_python_ends_with_it_too(tmp_path: Path) -> None:
    """The process that started it died without a word: its end of the pipe is gone."""
    (tmp_path / "module.py").write_text(MODULE)
    code = f"import ahead, os, time; ahead.start({str(tmp_path)!r}, ['module.py'])\n"
    code += f"while not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.02)\nos._exit(1)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(ahead.__file__).parent, timeout=60, check=False)
    until(lambda: not running(int((tmp_path / "pid").read_text().split()[0])))
