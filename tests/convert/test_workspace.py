"""The work folder: whose it is, who may enter, what is done, what goes away."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convert import workspace
from convert.options import JobOptions, validated
from convert.workspace import Workspace, open_workspace
from exl_runtime.errors import ConvertError, StorageError
from exl_runtime.files import write_json

MEMORY = 1 << 20


@pytest.fixture
def job(tmp_path: Path) -> JobOptions:
    return validated(JobOptions(source=tmp_path / "in", out=tmp_path / "out", bits=4.0))


def enter(tmp_path: Path, job: JobOptions, identity: str = "model"):
    return open_workspace(tmp_path / "work", job, identity, MEMORY)


def refuse(tmp_path: Path, job: JobOptions, words: str, identity: str = "model") -> None:
    with pytest.raises(ConvertError, match=words) as caught, enter(tmp_path, job, identity):
        pass
    assert caught.value.hint and "\n" not in caught.value.problem


def begin(tmp_path: Path, job: JobOptions) -> Path:
    with enter(tmp_path, job) as space:
        write_json(space.protocol, {})
    return tmp_path / "work"


def test_a_folder_is_made_and_found_again(tmp_path: Path, job: JobOptions) -> None:
    with enter(tmp_path, job) as space:
        assert not space.begun and not space.calibrated and not space.encoded(0)
        space.protocol.write_text("{}")
        assert space.begun and not space.calibrated
        space.calibration.write_bytes(b"")
        assert space.calibrated
        space.layer(3).write_bytes(b"")
        assert not space.encoded(3)
        space.notes(3).write_text("{}")
        space.layer(None).write_bytes(b"")
        space.notes(None).write_text("{}")
    with enter(tmp_path, job) as space:
        assert space.calibrated and space.encoded(3) and space.encoded(None) and not space.encoded(0)
    assert json.loads((tmp_path / "work" / "job.json").read_text())["model"] == "model"


def test_half_written_files_and_scratch_go_when_it_is_opened_and_when_it_is_left(tmp_path: Path, job) -> None:
    work = begin(tmp_path, job)
    for name in ("a.partial", "layers/x.partial", "states/y.partial", "tuned/z.partial", "scratch/1.f32"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("1")
    with enter(tmp_path, job) as space:
        assert sorted(path.name for path in work.rglob("*") if path.is_file()) == [
            ".lock",
            "calibration.json",
            "job.json",
        ]
        (work / "states" / "y.partial").write_text("1")
        assert space.folder == work
    assert not list(work.rglob("*.partial"))


def test_nothing_stays_of_a_job_that_failed_before_anything_was_done(tmp_path: Path, job: JobOptions) -> None:
    with pytest.raises(ConvertError), enter(tmp_path, job):
        raise ConvertError("too few")
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), enter(tmp_path, job):  # but --resume shall find it
        raise KeyboardInterrupt
    assert (tmp_path / "work" / "job.json").exists()
    begin(tmp_path, job)
    with pytest.raises(ConvertError), enter(tmp_path, job):
        raise ConvertError("the disk is full")
    assert (tmp_path / "work" / "calibration.json").exists()


def test_strangers(tmp_path: Path, job: JobOptions) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("1")
    refuse(tmp_path, job, "thesis.txt")
    assert os.listdir(work) == ["thesis.txt"]  # not even a lock is left
    (work / "thesis.txt").unlink()
    (work / "job.json.partial").write_text("{")  # killed before its first file had its name
    with enter(tmp_path, job):
        assert (work / "job.json").exists()
    (tmp_path / "file").write_text("1")
    with pytest.raises(StorageError, match="file"), open_workspace(tmp_path / "file", job, "model", MEMORY):
        pass


def test_other_options_and_models(tmp_path: Path, job: JobOptions) -> None:
    work = begin(tmp_path, job)
    refuse(tmp_path, replace(job, bits=3.5), r"bits: 4\.0 when the job started, 3\.5 now")
    refuse(tmp_path, job, "not the one the job was started with", "other")
    with enter(tmp_path, replace(job, out=tmp_path / "elsewhere", threads=2)):
        pass
    assert json.loads((work / "job.json").read_text())["options"]["out"] == str(tmp_path / "elsewhere")
    record = json.loads((work / "job.json").read_text())
    (work / "job.json").write_text(json.dumps({**record, "version": 99}))
    refuse(tmp_path, job, "another version")
    (work / "job.json").write_text('{"version": 1, "options": 3}')
    refuse(tmp_path, job, "not the options of a job")
    (work / "job.json").write_text("nonsense")
    refuse(tmp_path, job, "job.json")
    assert (work / "calibration.json").exists()


def test_a_job_of_which_nothing_is_done_gives_way(tmp_path: Path, job: JobOptions) -> None:
    for bits in (4.0, 3.5):
        with pytest.raises(KeyboardInterrupt), enter(tmp_path, replace(job, bits=bits), f"model {bits}"):
            raise KeyboardInterrupt
        assert json.loads((tmp_path / "work" / "job.json").read_text())["options"]["bits"] == bits


def test_one_process_at_a_time(tmp_path: Path, job: JobOptions) -> None:
    with enter(tmp_path, job):
        refuse(tmp_path, job, "another process")
    begin(tmp_path, job)


def test_a_lock_that_its_holder_took_away(tmp_path: Path, job: JobOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened while another process held it, free now that the folder is cleared: it keeps nobody out."""
    begin(tmp_path, job)
    real = workspace.take_lock

    def late(*args) -> None:
        (tmp_path / "work" / ".lock").unlink()
        real(*args)

    monkeypatch.setattr(workspace, "take_lock", late)
    refuse(tmp_path, job, "another process")


def test_file_systems_without_locks_are_trusted(tmp_path: Path, job, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, kind: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(workspace.fcntl, "flock", none)
    begin(tmp_path, job)


def test_a_result_that_got_its_name(tmp_path: Path, job: JobOptions) -> None:
    out = tmp_path / "out"
    begin(tmp_path, job)
    with enter(tmp_path, job) as space:
        assert not space.published(out)
        report = tmp_path / "report.json"
        report.write_text("1")
        space.announce(report)
        assert not space.published(out)
    out.mkdir()
    with enter(tmp_path, job) as space:
        assert not space.published(out)
        report.rename(out / "report.json")
        assert space.published(out)
        (out / "report.json").write_text("2")  # somebody else's
        assert not space.published(out)


def test_removing_leaves_what_is_not_ours(tmp_path: Path, job: JobOptions) -> None:
    with enter(tmp_path, job) as space:
        for path in (space.measured(0), space.layer(0), space.states(0, "source"), space.protocol, space.tuned / "x"):
            path.write_text("1")
        (space.folder / "notes.txt").write_text("1")
        space.remove()
    assert os.listdir(tmp_path / "work") == ["notes.txt"]
    (tmp_path / "work" / "notes.txt").unlink()
    with enter(tmp_path, job) as space:
        space.remove()
    assert not (tmp_path / "work").exists()


def test_scratch_is_in_memory_while_little(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    space = Workspace(tmp_path, 5 * 4 * 6 * 2)  # a fifth of it is room for two copies of six floats
    assert space.scratch((1, 2, 3), copies=2).path is None
    assert space.scratch((1, 2, 3), copies=3).path is not None
    assert space.scratch((1, 2, 4), copies=2).path is not None
    paths = {space.scratch((4, 8, 8)).path for _ in range(3)}
    assert len(paths) == 3 and None not in paths
    values = torch.arange(4 * 8 * 8).view(4, 8, 8).float()
    states = space.scratch((4, 8, 8))
    states.write(0, values)
    assert torch.equal(states.read(1, 3), values[1:3])
