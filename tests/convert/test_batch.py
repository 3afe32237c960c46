"""Batch files: what they mean, what is refused by name, and how the jobs run."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from convert.batch import read_batch, run_batch
from convert.options import JobOptions
from exl_runtime.console.progress import JsonReporter, QuietReporter
from exl_runtime.errors import ConvertError, UsageError


def batch(folder: Path, text: str) -> list[JobOptions]:
    path = folder / "list.toml"
    path.write_text(text, encoding="utf-8")
    return read_batch(path)


def test_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (job,) = batch(
        tmp_path,
        """
        [[job]]
        in = "src"
        out = "/elsewhere/out"
        head-bits = 8
        work = "~/w"
        calibration = "a.txt"
        rows = 64
        length = 512
        measurement = "m.json"
        target-vram = "11.5GiB"
        context = 4096
        cache = "q8"
        encoder = "classic"
        shard-size = 100
        seed = 7
        device = "cuda:1"
        threads = 2
        """,
    )
    assert job == JobOptions(
        source=tmp_path / "src",
        out=Path("/elsewhere/out"),
        head_bits=8,
        work=tmp_path / "me" / "w",
        calibration=(tmp_path / "a.txt",),
        rows=64,
        length=512,
        measurement=tmp_path / "m.json",
        target_vram=23 * 2**29,
        context=4096,
        cache="q8",
        encoder="classic",
        shard_mb=100,
        seed=7,
        device="cuda:1",
        threads=2,
    )
    (only,) = batch(tmp_path, '[[job]]\nin = "src"\nwork = "w"\nmeasure-only = true')
    assert only.measure_only and only.out is None


def test_a_ladder_shares_one_measurement(tmp_path: Path) -> None:
    jobs = batch(
        tmp_path,
        """
        [defaults]
        calibration = ["a.txt", "b.txt"]
        encoder = "best"
        [[job]]
        in = "src"
        out = "src-{bits}bpw"
        bits = [3, 4.25]
        [[job]]
        in = "src"
        out = "other"
        bits = 5.0
        calibration = []
        [[job]]
        source = "./src"
        out = "again"
        bits = 6.0
        """,
    )
    assert [job.bits for job in jobs] == [3.0, 4.25, 5.0, 6.0] and all(type(job.bits) is float for job in jobs)
    assert [job.out.name for job in jobs] == ["src-3.0bpw", "src-4.25bpw", "other", "again"]
    measured = tmp_path / "src-3.0bpw" / "measurement.json"
    assert [job.measurement for job in jobs] == [None, measured, None, measured]
    assert jobs[0].calibration == (tmp_path / "a.txt", tmp_path / "b.txt") and jobs[2].calibration == ()


@pytest.mark.parametrize(
    "line",
    ['encoder = "classic"', "rows = 9", "length = 64", "seed = 1", 'measurement = "m.json"', 'calibration = "a"'],
)
def test_what_is_measured_otherwise_is_not_shared(line: str, tmp_path: Path) -> None:
    first = '[[job]]\nin = "src"\nout = "one"\nbits = 3.0\n'
    jobs = batch(tmp_path, f'{first}[[job]]\nin = "src"\nout = "two"\nbits = 4.0\n{line}\n')
    wanted = tmp_path / "m.json" if "measurement" in line else None
    assert jobs[1].measurement == wanted
    assert batch(tmp_path, f'{first}[[job]]\nin = "src"\nout = "two"\nbits = 4.0\n')[1].measurement is not None


def test_a_job_overrides_the_defaults_that_exclude_its_own(tmp_path: Path) -> None:
    defaults = '[defaults]\nin = "src"\ntarget-vram = "8GB"\ncache = "q4"\ncontext = 100\n'
    jobs = batch(tmp_path, defaults + '[[job]]\nout = "a"\n[[job]]\nout = "b"\nbits = 3.0')
    assert [job.target_vram for job in jobs] == [8 * 10**9, None] and jobs[1].cache == "fp16"
    (job,) = batch(tmp_path, '[defaults]\nbits = 3.0\n[[job]]\nin = "src"\nout = "a"\ntarget-vram = "8GB"')
    assert job.bits is None


GOOD = '[[job]]\nin = "src"\nout = "out"\nbits = 4.0\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"holds no \[\[job\]\]"),
        ("job = 3", r"holds no \[\[job\]\]"),
        ("[job]\nin = 'x'", r"holds no \[\[job\]\]"),
        ("defaults = 3\n" + GOOD, "not a table"),
        ("[default]\n" + GOOD, r"unknown key 'default'\n  hint: did you mean defaults\?"),
        ("[[job]\n", "not TOML"),
        ("x = '\udcff'", "not TOML"),
        (GOOD + "head_bits = 6", r"job 1: unknown key 'head_bits'\n  hint: did you mean head-bits\?"),
        (GOOD + "colour = 6", r"unknown key 'colour'\n  hint: known are in, out"),
        ("[defaults]\nfrom = 'x'\n" + GOOD, r"\[defaults\]: unknown key 'from'"),
        (GOOD + GOOD.replace('"out"', '"two"').replace("4.0", '"4"'), "job 2: bits must be a number, is '4'"),
        (GOOD + "source = 'x'", "both in and source"),
        (GOOD + "rows = 4.0", "rows must be a whole number, is 4.0"),
        (GOOD + "rows = true", "rows must be a whole number, is true"),
        (GOOD + "measure-only = 1", "measure-only must be true or false"),
        (GOOD + "calibration = [1]", "calibration must be a path or a list of paths"),
        (GOOD + "calibration = ''", "calibration must be a path or a list of paths"),
        (GOOD + "work = ''", "work must be a text"),
        (GOOD + "cache = 8", "cache must be a text"),
        (GOOD + "rows = 1", "job 1: --rows 1"),
        (GOOD.replace("bits = 4.0", "target-vram = '8'"), "job 1: target-vram: '8' is not a size"),
        (GOOD.replace("bits = 4.0", "target-vram = 8"), "target-vram must be a text"),
        (GOOD.replace("4.0", "[3.0, 4.0]"), r"bits is a list, so out must contain \{bits\}"),
        (GOOD.replace("4.0", "[]"), "bits is an empty list"),
        (GOOD.replace("4.0", "[3.0, [4.0]]").replace('"out"', '"{bits}"'), "bits must be a number"),
        (GOOD.replace("4.0", "[3.0, 3]").replace('"out"', '"{bits}"'), "two jobs have the same out"),
        (GOOD.replace("4.0", "[3.0, 4.0]").replace('"out"', '"{bits}"') + "work = 'w'", "work must contain"),
        (GOOD + "work = 'w'\n" + GOOD.replace('"out"', '"o"') + "work = 'w'", "two jobs have the same work"),
        (GOOD + GOOD, "two jobs have the same out"),
        (GOOD.replace('in = "src"', ""), "job 1: in is missing"),
    ],
)
def test_refusals_name_the_place(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "list.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=words) as caught:
        read_batch(path)
    assert str(path) in caught.value.problem and "\n" not in caught.value.problem


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_batch(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_batch(tmp_path)


def outcome(job: JobOptions) -> SimpleNamespace:
    """What a job leaves behind, made on the disk too."""
    job.out.mkdir()
    (job.out / "config.json").write_text("{}")
    (job.out / "measurement.json").write_text("{}")
    divergence = (SimpleNamespace(kl_mean=0.0125),)
    return SimpleNamespace(
        folder=job.out, bits_stored=job.bits - 0.002, bytes=3 * 2**20, seconds=65.0, divergence=divergence
    )


@pytest.fixture
def jobs(tmp_path: Path) -> list[JobOptions]:
    return batch(tmp_path, '[[job]]\nin = "src"\nout = "r-{bits}"\nbits = [2.5, 3.0, 4.0, 5.0]')


def test_jobs_run_in_order_and_end_in_a_table(jobs: list[JobOptions], capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    assert run_batch(jobs, lambda job: (seen.append(job), outcome(job))[1], QuietReporter()) == 0
    assert seen == jobs
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["result", "state", "bits", "size", "KL", "mean", "time"] and len(lines) == 5
    assert lines[1].split() == [str(jobs[0].out), "done", "2.498", "3.0", "MiB", "0.01250", "1:05"]


def test_a_failed_job_does_not_stop_the_others(jobs: list[JobOptions], capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def run(job: JobOptions) -> SimpleNamespace:
        seen.append(job)
        if job.bits == 2.5:
            raise ConvertError("2.5 bits\x1b cannot be", hint="more")
        return outcome(job)

    assert run_batch(jobs, run, QuietReporter()) == 2
    # The measurement that the first one promised is not there: the second makes its own, the others use that.
    own = jobs[1].out / "measurement.json"
    assert [job.measurement for job in seen] == [None, None, own, own]
    assert seen[1] == replace(jobs[1], measurement=None)
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()[1:5]] == ["failed", "done", "done", "done"]
    assert out.splitlines()[5] == f"{jobs[0].out}: 2.5 bits\\x1b cannot be" and "\x1b" not in out + err
    assert "hint: more" in err

    # Once more: what is finished is passed over, and still stands in.
    seen.clear()
    for path in jobs[3].out.iterdir():
        path.unlink()
    jobs[3].out.rmdir()
    assert run_batch(jobs, run, QuietReporter()) == 2
    assert [(job.bits, job.measurement) for job in seen] == [(2.5, None), (5.0, own)]
    assert "finished before" in capsys.readouterr().out


def test_a_bug_or_an_interrupt_ends_the_batch(jobs: list[JobOptions]) -> None:
    for error in (KeyboardInterrupt, ZeroDivisionError):

        def run(job: JobOptions, error: type[BaseException] = error) -> SimpleNamespace:
            raise error

        with pytest.raises(error):
            run_batch(jobs, run, QuietReporter())


def test_measuring_jobs_are_never_taken_for_finished(tmp_path: Path) -> None:
    (job,) = batch(tmp_path, '[[job]]\nin = "src"\nout = "o"\nmeasure-only = true')
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "config.json").write_text("{}")
    seen = []
    done = SimpleNamespace(folder=None, seconds=3.0)
    assert run_batch([job], lambda job: (seen.append(job), done)[1], QuietReporter()) == 0
    assert seen == [job]


def test_a_batch_in_json(jobs: list[JobOptions], capsys: pytest.CaptureFixture[str]) -> None:
    def run(job: JobOptions) -> SimpleNamespace:
        if job.bits == 4.0:
            raise ConvertError("no")
        return outcome(job)

    assert run_batch(jobs, run, JsonReporter()) == 2
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["event"] for entry in seen] == [*["say"] * 3, "warning", "error", "say", "batch"]
    states = [entry["state"] for entry in seen[-1]["jobs"]]
    assert states == ["done", "done", "failed", "done"] and seen[-1]["jobs"][2]["problem"] == "no"
