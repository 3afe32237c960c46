"""A conversion that is cut off anywhere, by anything, ends with the same bytes as one that is left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from converting import (
    Quiet,
    convert,
    files_under,
    full,
    in_a_hurry,
    interrupted,
    options,
    refused,
    restore,
    small_model,
    snapshots,
    weights,
)

from convert import workspace
from convert.job import resume
from convert.options import to_json
from exl_runtime.errors import StorageError


@pytest.fixture(scope="module", autouse=True)
def quick():
    with in_a_hurry():
        yield


class Recorded:
    """A conversion that was watched: the folder of its result and work, its options, its files, its snapshots."""

    def __init__(self, models: Path, base: Path, name: str, encoder: str) -> None:
        self.root = base / "here"
        self.root.mkdir()
        self.out, self.work = self.root / "out", self.root / "out.work"
        bits = 3.6 if encoder == "best" else 5.5  # few, so that tuning finds something to do
        self.job = options(small_model(name, models), self.out, encoder=encoder, bits=bits)
        self.snapshots = snapshots(self.root, base / "snapshots", lambda: convert(self.job))
        self.weights = weights(self.out)
        self.files = sorted(path.name for path in self.out.iterdir())

    def expect(self) -> None:
        """The result is there, whole, the same, and alone."""
        assert weights(self.out) == self.weights
        assert sorted(path.name for path in self.out.iterdir()) == self.files
        assert os.listdir(self.root) == ["out"]

    @property
    def unfinished(self) -> list[Path]:
        """The snapshots before the result got its name."""
        return [snapshot for snapshot in self.snapshots if not (snapshot / "out").exists()]


@pytest.fixture(scope="module")
def dense(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(models, tmp_path_factory.mktemp("dense"), "llama", "best")


def check(recorded: Recorded, snapshot: Path) -> None:
    restore(snapshot, recorded.root)
    if recorded.out.exists() and not (recorded.work / "job.json").exists():  # nothing was left to do
        assert "not empty" in refused(recorded.job).problem
        assert weights(recorded.out) == recorded.weights
    else:
        convert(recorded.job)
        recorded.expect()


def test_a_power_cut_at_any_moment(dense: Recorded) -> None:
    """Whatever was finished, half-written or not flushed when the machine stopped."""
    assert len(dense.snapshots) > 40 and any((path / "out.work/tuned/done.json").exists() for path in dense.snapshots)
    assert "tuned end to end" in (dense.out / "report.md").read_text()
    for snapshot in dense.snapshots:
        check(dense, snapshot)


@pytest.mark.parametrize(("name", "encoder"), [("llama", "classic"), ("mixtral", "best"), ("mixtral", "classic")])
def test_a_power_cut_at_some_moments(name: str, encoder: str, models: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(workspace, "MEMORY_SHARE", 0)  # hidden states on the disk
    recorded = Recorded(models, tmp_path, name, encoder)
    for snapshot in recorded.snapshots[::8]:
        check(recorded, snapshot)


def test_interrupted_again_and_again(dense: Recorded) -> None:
    """Ctrl-C, with all its clean-up, after a few more files each time."""
    shutil.rmtree(dense.root)
    dense.root.mkdir()
    draw = random.Random(1)
    times = 0
    while not dense.out.exists():
        try:
            with interrupted(draw.randrange(1, 13)):
                convert(dense.job)
        except KeyboardInterrupt:
            times += 1
            assert dense.out.exists() or "out.partial" not in os.listdir(dense.root)
    if dense.work.exists():
        convert(dense.job)
    assert times > 4
    dense.expect()


def test_whatever_is_missing_from_a_work_folder_is_made_again(dense: Recorded) -> None:
    last = dense.unfinished[-1]
    for seed in range(8):
        restore(last, dense.root)
        draw = random.Random(seed)
        files = [path for path in sorted(dense.work.rglob("*")) if path.is_file() and path.name != "job.json"]
        for path in draw.sample(files, draw.randrange(1, len(files))):
            path.unlink()
        convert(dense.job)
        dense.expect()


# --- no room ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("write",), ("write", "reserve")], ids="-".join)
def test_a_full_disk_at_any_stage(kinds: tuple[str, ...], dense: Recorded) -> None:
    """One line; nothing half-written; nothing that was finished is lost. With room again, it goes on."""
    unfinished = dense.unfinished if len(kinds) == 1 else dense.unfinished[::4]
    for number, snapshot in enumerate(unfinished):
        restore(snapshot, dense.root)
        before = files_under(dense.work)
        with full(kinds):
            error = refused(dense.job)
        assert isinstance(error, StorageError) and "the disk is full" in error.problem
        assert str(dense.root) in error.problem and "same command" in error.hint
        if before.keys() <= {"out.work/job.json"}:  # nothing was done yet, so nothing stays
            assert os.listdir(dense.root) == []
            continue
        assert os.listdir(dense.root) == ["out.work"]
        after = files_under(dense.work)
        # Hidden states that no layer waits for are cleared away; nothing else may go.
        assert {name: data for name, data in before.items() if "/states/" not in name}.items() <= after.items()
        assert not list(dense.work.rglob("*.partial"))
        if number % 8 == 0:
            convert(dense.job)
            dense.expect()


def test_a_disk_that_fills_up_while_the_result_is_written(dense: Recorded) -> None:
    for allowed in (5, 60):
        restore(dense.unfinished[-14], dense.root)
        with full(allowed=allowed):
            assert "the disk is full" in refused(dense.job).problem
        assert os.listdir(dense.root) == ["out.work"]
    convert(dense.job)
    dense.expect()


# --- another place ----------------------------------------------------------------------------------------------------


def test_a_work_folder_that_was_moved_and_a_result_that_goes_elsewhere(dense: Recorded) -> None:
    middle = dense.snapshots[len(dense.snapshots) // 2]
    restore(middle, dense.root)
    moved, other = dense.root / "moved", dense.root / "other"
    dense.work.rename(moved)
    resume(moved, Quiet())
    dense.expect()
    restore(middle, dense.root)
    shutil.rmtree(dense.root / "out.partial")
    resume(dense.work, Quiet(), options(dense.job.source, other, bits=3.6))
    assert weights(other) == dense.weights and os.listdir(dense.root) == ["other"]


# --- a real kill ------------------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
sys.path[:0] = json.loads(sys.argv[1])
from converting import Quiet, in_a_hurry, interrupted
from convert.job import run
from convert.options import from_json, validated

class Kill(BaseException):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGKILL)

job = validated(from_json(json.loads(sys.argv[2])))
ends = []
for names in (1, 3, 6, 12, 10**9):
    child = os.fork()
    if child == 0:
        with in_a_hurry(), interrupted(names, Kill):
            run(job, Quiet())
        os._exit(0)
    ends.append(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""


def test_killed_for_real(dense: Recorded) -> None:
    shutil.rmtree(dense.root)
    dense.root.mkdir()
    here = Path(__file__).resolve().parents[2]
    path = json.dumps([str(here), str(here / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, path, json.dumps(to_json(dense.job))], capture_output=True, text=True, cwd=here
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [signal.SIGKILL] * 4 + [0]
    dense.expect()
