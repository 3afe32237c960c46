"""The command line with a conversion that is made up: what reaches it, what is printed, how it may end."""

import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from convert import cli
from convert.arguments import build_parser
from convert.options import JobOptions, to_json
from convert.report import Divergence
from exl_runtime.cli.main import guarded
from exl_runtime.cli.main import main as exl
from exl_runtime.console.progress import printable_lines
from exl_runtime.errors import ConvertError, UsageError


@dataclass(frozen=True)
class Outcome:
    folder: Path | None
    measurement: Path | None = None
    bits_stored: float = 3.995
    bits_target: float = 4.0
    divergence: tuple[Divergence, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 125.0
    bytes: int = 3 * 2**29


TEXT = Divergence(
    tokens=2048,
    kl_mean=0.0123,
    kl_median=0.004,
    kl_p99=0.18,
    top1=0.947,
    perplexity=2.42,
    source_perplexity=math.nan,
    text="held-out\x1b stories",
)


class Job(ModuleType):
    """Stands in for `convert.job`; `seen` holds the calls, `does` what a call does beside."""

    def __init__(self) -> None:
        super().__init__("convert.job")
        self.seen: list[tuple[Any, ...]] = []
        self.does: Callable[[Any], None] = lambda progress: None
        self.outcome: dict[str, Any] = {"divergence": (TEXT,)}

    def run(self, options: JobOptions, progress: Any) -> Outcome:
        self.seen.append(("run", options))
        self.does(progress)
        return Outcome(folder=options.out, **self.outcome)

    def resume(self, work: Path, progress: Any, options: JobOptions | None) -> Outcome:
        self.seen.append(("resume", work, options))
        self.does(progress)
        return Outcome(folder=Path("out"), **self.outcome)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    fake = Job()
    monkeypatch.setitem(sys.modules, "convert.job", fake)
    monkeypatch.setattr(sys, "argv", ["convert"])
    monkeypatch.chdir(tmp_path)
    return fake


LINE = ["-i", "src", "-o", "out", "-b", "4"]


def test_help_is_complete_and_instant(repo: Path) -> None:
    script = (
        "import sys\nfrom convert.cli import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'rich', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in (
        *("-i", "--in", "-o", "--out", "-b", "--bits", "--head-bits", "--work", "--calibration", "--rows", "--length"),
        *("--measurement", "--measure-only", "--target-vram", "--context", "--cache", "--encoder", "--shard-size"),
        *("--seed", "--device", "--threads", "--resume", "--batch", "--quiet", "--json", "-v", "--verbose"),
    ):
        assert f"{flag} " in done.stdout or f"{flag}," in done.stdout or f"{flag}\n" in done.stdout, flag
    assert "python -m convert --resume models/" in done.stdout and "%(prog)s" not in done.stdout


def test_the_module_and_the_command_are_the_same(repo: Path) -> None:
    for command, name in (("convert", "python -m convert"), ("exl_runtime convert", "exl convert")):
        line = [sys.executable, "-m", *command.split(), "--nonsense"]
        done = subprocess.run(line, cwd=repo, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        hint = f"{name} --help shows what it takes"
        assert done.stderr == f"convert: unrecognized arguments: --nonsense\n  hint: {hint}\n"


def test_exl_convert_hands_over(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(exl, ["convert", *LINE, "--quiet"]) == 0
    assert job.seen[0][1].bits == 4.0
    assert guarded(exl, ["convert", "-i", "x"]) == 2
    assert "folder for the result" in capsys.readouterr().err


def test_every_option_reaches_the_job(job: Job, tmp_path: Path) -> None:
    line = (
        "-i src -o out --head-bits 8 --work w --calibration a.txt b.jsonl --rows 64 --length 512 --measurement m.json"
    )
    line += " --target-vram 11.5G --context 8k --cache q6 --encoder classic --shard-size 100 --seed 7 --device cuda:1"
    assert cli.main([*line.split(), "--threads", "3", "--quiet"]) == 0
    wanted = JobOptions(
        source=tmp_path / "src",
        out=tmp_path / "out",
        head_bits=8,
        work=tmp_path / "w",
        calibration=(tmp_path / "a.txt", tmp_path / "b.jsonl"),
        rows=64,
        length=512,
        measurement=tmp_path / "m.json",
        target_vram=23 * 2**29,
        context=8192,
        cache="q6",
        encoder="classic",
        shard_mb=100,
        seed=7,
        device="cuda:1",
        threads=3,
    )
    assert job.seen == [("run", wanted)]
    job.outcome = {"measurement": Path("w/measurement.json")}
    assert cli.main(["-i", "src", "--work", "w", "--measure-only"]) == 0
    assert job.seen[1][1] == JobOptions(source=tmp_path / "src", work=tmp_path / "w", measure_only=True)
    assert {action.dest for action in build_parser()._actions} >= {field.name for field in fields(JobOptions)}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-o out -b 4", "the folder of the model is missing"),
        ("-i src -o out", "how many bits"),
        ("-i src -o out -b four", "-b/--bits: invalid float value: 'four'"),
        ("-i src -o out -b 4 --rows 3", "--rows 3"),
        ("-i src -o out --target-vram 12", "argument --target-vram: '12' is not a size; 12GB"),
        ("-i src -o out --target-vram 8G --cache q5", "--cache 'q5': no such type"),
        ("-i src -o out -b 4 --context 8kk", "is not a whole number"),
        ("-i src -o out -b 4 --encod best", "unrecognized"),
        ("-i src -o out -b 4 --quiet --json", "not allowed with"),
        ("-i src -o out -b 4 --bat x", "unrecognized"),
        ("--batch list.toml -b 4", "--batch and --bits exclude"),
        ("--batch list.toml --resume w", "--batch and --resume exclude"),
        ("--resume w --work w", "--work and --resume exclude"),
        ("--resume absent -b 4", "no job was started"),
        ("--batch absent.toml", "no such file"),
        ("--calibration -b 4", "expected at least one argument"),
        ("-i src -o out -b 4 stray\x1b", "unrecognized arguments: stray\\x1b"),
    ],
)
def test_wrong_lines_are_one_short_message(line: str, words: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split(" ")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("convert: ") and words in err and len(err.splitlines()) <= 2
    assert job.seen == [] and "\x1b" not in err


def test_empty_paths_and_no_arguments(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-i", "", "-o", "out", "-b", "4"]) == 2
    assert "an empty path" in capsys.readouterr().err
    assert cli.main([]) == 0
    assert "usage:" in capsys.readouterr().out and job.seen == []


def test_the_summary(job: Job, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job.outcome |= {"warnings": ("said before", "never said\x07")}

    def work(progress: Any) -> None:
        progress.warn("said before")
        with progress.stage("Encode", 1) as stage:
            stage.advance()

    job.does = work
    assert cli.main(LINE) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        str(tmp_path / "out"),
        "  3.995 bits per weight (4.000 wanted), 1.50 GiB, in 2:05",
        "  on held-out\\x1b stories, 2048 tokens:",
        "    KL mean 0.01230, median 0.00400, 99 % below 0.18000; same top token 94.70 %",
        "    perplexity 2.4200, the source's n/a",
        "  2 warnings, see the report",
        f"  report: {tmp_path / 'out' / 'report.md'}",
    ]
    assert err.splitlines() == [
        "convert: warning: said before",
        "convert: Encode: 1 steps",
        "convert: Encode: done, 1 steps in 0:00",
        "convert: warning: never said\\x07",
    ]
    job.outcome = {}
    assert cli.main([*LINE, "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    text = cli.summary(Outcome(folder=None, measurement=Path("w/measurement.json")))
    assert text == "measured in 2:05: w/measurement.json\n  use it with --measurement"


def test_json_lines_only(job: Job, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job.does = lambda progress: progress.say("hello")
    assert cli.main([*LINE, "--json"]) == 0
    out, err = capsys.readouterr()
    said, done = map(json.loads, out.splitlines())
    assert err == "" and said == {"event": "say", "text": "hello"}
    assert done["event"] == "done" and done["folder"] == str(tmp_path / "out") and done["bytes"] == 3 * 2**29
    assert done["divergence"][0]["kl_p99"] == 0.18 and done["divergence"][0]["source_perplexity"] is None
    assert done["report"] == str(tmp_path / "out" / "report.json") and done["measurement"] is None
    assert (done["bits_stored"], done["bits_target"], done["seconds"], done["warnings"]) == (3.995, 4.0, 125.0, [])


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(job: Job, tmp_path: Path) -> JobOptions:
    options = JobOptions(source=tmp_path / "src", out=tmp_path / "out", bits=4.0, calibration=(tmp_path / "a.txt",))
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "job.json").write_text(json.dumps({"options": to_json(options)}))
    return options


def test_resume(job: Job, started: JobOptions, tmp_path: Path) -> None:
    assert cli.main(["--resume", "out.work", "--quiet"]) == 0
    assert cli.main(["--resume", "out.work", *LINE, "--calibration", "a.txt", "--head-bits", "6"]) == 0
    assert cli.main(["--resume", "out.work", "--threads", "2", "--device", "cpu", "-o", "moved"]) == 0
    changed = replace(started, threads=2, device="cpu", out=tmp_path / "moved")
    assert job.seen == [("resume", Path("out.work"), options) for options in (None, started, changed)]


def test_changed_options_are_refused(job: Job, started: JobOptions, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--resume", "out.work", "-b", "3.5", "--seed", "1"]) == 2
    err = capsys.readouterr().err
    assert "bits: 4.0 when the job started, 3.5 now; seed: 0 when the job started, 1 now" in err
    assert len(err.splitlines()) == 2 and job.seen == []
    assert cli.main(["--resume", "out.work", "--target-vram", "8GB"]) == 2
    assert "target-vram: not given when the job started, 8.00 GB" in capsys.readouterr().err
    assert cli.main(["--resume", "out.work", "--threads", "0"]) == 2
    assert "--threads 0" in capsys.readouterr().err and job.seen == []


def test_batch(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.toml").write_text('[[job]]\nin = "src"\nout = "r{bits}"\nbits = [1.0, 3.0]')
    errors = [ConvertError("cannot be"), None]

    def work(progress: Any) -> None:
        if (error := errors.pop(0)) is not None:
            raise error

    job.does = work
    assert cli.main(["--batch", "list.toml", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert [call[1].bits for call in job.seen] == [1.0, 3.0]
    assert f"{tmp_path / 'r3.0'}\n  3.995 bits" in out and "failed" in out and "cannot be" in err
    job.does = lambda progress: None
    assert cli.main(["--batch", "list.toml", "--json"]) == 0
    kinds = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["say", "done", "say", "done", "batch"]


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error", "a/b"), RuntimeError("CPU: can't allocate memory")]
)
def test_limits_of_the_machine_do_not_end_a_batch(error: Exception, job: Job, tmp_path: Path) -> None:
    (tmp_path / "list.toml").write_text('[[job]]\nin = "src"\nout = "r{bits}"\nbits = [2.5, 3.0]')

    def work(progress: Any) -> None:
        if len(job.seen) == 1:
            raise error

    job.does = work
    assert cli.main(["--batch", "list.toml", "--quiet"]) == 2 and len(job.seen) == 2


# --- how it may end -------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[Any], None]:
    def work(progress: Any) -> None:
        with progress.stage("Encode", 3):
            raise error

    return work


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConvertError("bad \x1b[31mname", hint="fix\x9bit"), 2, ["convert: bad \\x1b[31mname\n  hint: fix\\x9bit\n"]),
        (UsageError("wrong"), 2, ["convert: wrong\n"]),
        (KeyboardInterrupt(), 130, ["convert: interrupted; the same command, or --resume ", "out.work, goes on where"]),
        (MemoryError(), 2, ["out of memory", "--rows"]),
        (OutOfMemoryError("CUDA out of memory.\nlong story"), 2, ["CUDA out of memory.", "--device cpu"]),
        (PermissionError(13, "Permission denied", "a/b"), 2, ["a/b: Permission denied"]),
        (ZeroDivisionError("oops\x1b"), 1, ["bug", "ZeroDivisionError: oops\\x1b", "-v"]),
        (RuntimeError("shapes"), 1, ["bug", "RuntimeError: shapes"]),
        (RecursionError("deep"), 1, ["bug"]),
    ],
)
def test_errors_become_messages_and_codes(
    error: BaseException, code: int, words: list[str], job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.does = raising(error)
    assert cli.main([*LINE, "--quiet"]) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and "\x1b" not in err and len(err.splitlines()) <= 2
    for word in words:
        assert word in err
    assert cli.main([*LINE, "-v"]) == code
    assert ("Traceback" in capsys.readouterr().err) is not isinstance(error, KeyboardInterrupt)
    assert cli.main([*LINE, "--json"]) == code
    out, err = capsys.readouterr()
    last = json.loads(out.splitlines()[-1])
    assert last["event"] == "error" and err == f"convert: {printable_lines(last['message'])}\n"


def test_sigterm_is_an_interrupt(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    def other(number: int, frame: object) -> None:
        raise AssertionError("not reached")

    before = signal.signal(signal.SIGTERM, other)
    try:
        job.does = lambda progress: (os.kill(os.getpid(), signal.SIGTERM), threading.Event().wait(10))
        assert cli.main([*LINE, "--quiet"]) == 130
        assert "interrupted" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGTERM) is other
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main([*LINE, "--quiet"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_reader_that_goes_away(repo: Path) -> None:
    script = (
        "import sys, types\njob = types.ModuleType('convert.job')\n"
        "def run(options, progress):\n    while True: progress.say('x')\n"
        "job.run = run\nsys.modules['convert.job'] = job\nfrom convert.cli import main\n"
        "sys.exit(main('-i s -o o --target-vram 1GB --json'.split()))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == ""


def test_logs_become_lines(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("exl_runtime.model.weights")

    def work(progress: Any) -> None:
        logger.warning("a stale %s\x1b", "declaration")
        logger.info("detail")

    job.does = work
    root = logging.getLogger("exl_runtime")
    before = (root.handlers[:], root.level, root.propagate)
    assert cli.main([*LINE, "--quiet"]) == 0
    assert capsys.readouterr().err == "convert: warning: a stale declaration\\x1b\n"
    assert cli.main([*LINE, "-v"]) == 0
    assert "convert: detail\n" in capsys.readouterr().err
    assert (root.handlers[:], root.level, root.propagate) == before


def test_paths_that_no_encoding_can_show(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["-i", "src", "-o", "r\udcffé", "-b", "4", "--quiet"]) == 0
    assert b"r\\udcff\\xe9" in raw.getvalue()
