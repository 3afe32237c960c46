"""The command line without a model: parsing, exit codes, output, and what a hostile model may not do."""

import argparse
import io
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_runtime import FakeRuntime, Info

from exl_runtime import cli
from exl_runtime.cli import chat, doctor, info, main, options, run
from exl_runtime.console.program import StrictParser
from exl_runtime.errors import CheckpointError, PromptTooLong
from exl_runtime.sampling.params import SamplingParams

COMMANDS = ("", "chat", "run", "info", "doctor")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """A runtime that `exl` opens instead of a model; the arguments it was opened with are in `opened`."""
    fake = FakeRuntime(["the answer"])
    fake.opened = []

    def opened(args: argparse.Namespace) -> FakeRuntime:
        fake.opened.append(args)
        return fake

    monkeypatch.setattr(chat, "open_runtime", opened)
    monkeypatch.setattr(run, "open_runtime", opened)
    return fake


def exl(*arguments: str) -> int:
    return main.guarded(main.main, list(arguments))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_torch_free(command: str, repo: Path) -> None:
    script = (
        "import sys\nfrom exl_runtime.cli.main import main\n"
        f"try:\n    main({[command] if command else []} + ['--help'])\n"
        "except SystemExit as err:\n    assert not err.code\n"
        "heavy = {'torch', 'rich', 'prompt_toolkit', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: exl" in done.stdout


def test_the_module_is_the_command(repo: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "exl_runtime", "--version"], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("exl-runtime ")
    done = subprocess.run([sys.executable, "-m", "exl_runtime"], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0 and "chat" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["run"],
        ["run", "demo"],
        ["run", "demo", "-p", "x", "-n", "0"],
        ["run", "demo", "-p", "x", "-n", "many"],
        ["run", "demo", "-p", "x", "--deadline", "-1"],
        ["run", "demo", "-p", "x", "--temperature", "hot"],
        ["run", "demo", "-p", "x", "--temperature", "nan"],
        ["run", "demo", "-p", "x", "--top-p", "1.5"],
        ["run", "demo", "-p", "x", "--raw", "--system", "s"],
        ["run", "demo", "-p", "", "--json"],
        ["run", "demo", "-p", "a b", "--ids"],
        ["run", "demo", "-p", " ", "--ids"],
        ["chat", "--cache", "q4"],
        ["chat", "--context", "-5"],
        ["chat", "--overflow", "maybe"],
        ["chat", "--stop", ""],
        ["chat", "--tempera", "1"],
        ["run", "demo", "-p", "x", "--logit-bias", "5"],
    ],
)
def test_wrong_arguments_are_one_short_message(
    arguments: list[str], runtime: FakeRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exl(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("exl: ") and len(captured.err.splitlines()) <= 3
    assert "Traceback" not in captured.err
    assert runtime.seen == []


def test_every_sampling_parameter_has_an_option() -> None:
    parser = StrictParser(prog="x")
    options.add_sampling(parser)
    arguments: list[str] = []
    samples = {
        "logit_bias": "5=-1",
        "order": "min_p,top_k",
        "seed": "7",
        "dry_sequence_breakers": "a",
        "adaptive_decay": "0.5",
    }
    samples["allowed_tokens"] = "1,2"
    for field in fields(SamplingParams):
        if field.name == "logprobs":
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            arguments.append(flag)
        else:
            arguments += [flag, samples.get(field.name, "2" if field.name.endswith(("base", "curve", "temp")) else "1")]
    arguments.remove("--temperature-last")
    params = options.chosen_sampling(parser.parse_args(arguments))
    assert params.seed == 7 and params.top_k == 1 and params.ignore_eos and params.logit_bias == {5: -1.0}
    assert params.order == ("min_p", "top_k") and params.banned_tokens == (1,)
    assert options.chosen_sampling(parser.parse_args([])) == SamplingParams()


def test_run_prints_the_answer_only(runtime: FakeRuntime, capsys: pytest.CaptureFixture[str]) -> None:
    assert exl("run", "m", "-p", "question", "-n", "5", "--seed", "3", "-t", "0", "--stop", "\\n", "--system", "s") == 0
    assert capsys.readouterr() == ("the a\n", "")
    prompt, asked = runtime.seen[0]
    assert prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "question"}]
    assert asked["max_tokens"] == 5 and asked["stop"] == ("\n",) and asked["overflow"] == "error"
    assert asked["sampling"] == SamplingParams(seed=3, temperature=0.0)
    assert runtime.closed


def test_run_reads_standard_input(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert exl("run", "m", "-p", "-") == 0
    assert runtime.seen[0][0] == [{"role": "user", "content": "from a pipe"}]
    assert exl("run", "m", "-p", "as it is\n", "--raw", "-v") == 0
    assert exl("run", "m", "-p", "1, 2 3", "--ids") == 0
    assert [prompt for prompt, _ in runtime.seen[1:]] == ["as it is\n", [1, 2, 3]]
    assert "gen 10 tok" in capsys.readouterr().err


def test_run_json_is_one_event_per_line(runtime: FakeRuntime, capsys: pytest.CaptureFixture[str]) -> None:
    runtime.replies = ["a\x1b[31m\u2028ü"]
    assert exl("run", "m", "-p", "q", "--json") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[:3] == ["started", "prefilled", "text"] and kinds[-1] == "done"
    assert events[0]["prompt_tokens"] == len("<user>q\n<assistant>")
    assert "".join(event["text"] for event in events if event["event"] == "text") == runtime.replies[0]
    done = events[-1]
    assert done["text"] == runtime.replies[0] and done["stop_reason"] == "eos"
    assert done["ids"] == list(map(ord, runtime.replies[0]))
    assert {"prompt_tokens", "reused_tokens", "generated_tokens", "seconds_prefill", "seconds_decode"} <= set(done)


def test_run_json_tells_errors_too(runtime: FakeRuntime, capsys: pytest.CaptureFixture[str]) -> None:
    runtime.replies = [("half", PromptTooLong("the prompt is too long", hint="shorten it"))]
    assert exl("run", "m", "-p", "q", "--json") == 2
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert last["event"] == "error" and last["error"] == "PromptTooLong" and "shorten" in last["message"]
    assert captured.err == "exl: the prompt is too long\n  hint: shorten it\n"


def test_infinities_do_not_break_json() -> None:
    assert run._finite({"a": (1.0, float("-inf")), "b": [float("nan"), 2]}) == {"a": [1.0, None], "b": [None, 2]}


def test_a_terminal_gets_no_control_characters(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.replies = ["a\x1b]0;evil\x07b\x9b31m\tc\r\nd"]
    for tty, wanted in ((True, "a]0;evilb31m\tc\nd\n"), (False, runtime.replies[0] + "\n")):
        out = io.StringIO()
        out.isatty = lambda tty=tty: tty  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdout", out)
        assert exl("run", "m", "-p", "q") == 0
        assert out.getvalue() == wanted


def test_piped_chat_prints_the_answers(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo"))
    assert exl("chat", "m", "--system", "s") == 0
    assert capsys.readouterr() == ("the answer\nthe answer\n", "")
    assert len(runtime.seen[1][0]) == 4 and runtime.seen[0][1]["overflow"] == "drop"
    assert runtime.seen[0][1]["max_tokens"] == 512
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert exl("chat", "m") == 0
    assert "no message" in capsys.readouterr().err


def test_the_demo_says_that_it_is_a_toy_and_stays_short(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime.info = Info(name="demo", is_demo=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert exl("chat") == 0
    captured = capsys.readouterr()
    assert captured.out == "the answer\n" and "toy" in captured.err and "exl chat FOLDER" in captured.err
    assert runtime.opened[0].model == "demo"
    assert runtime.seen[0][1]["max_tokens"] == chat.DEMO_MAX_TOKENS
    assert exl("run", "demo", "-p", "hi") == 0
    captured = capsys.readouterr()
    assert captured.out == "the answer\n" and "toy" in captured.err


def test_loading_options_reach_load(monkeypatch: pytest.MonkeyPatch) -> None:
    import exl_runtime.runtime

    seen = {}

    def load(model: str, **given: object) -> FakeRuntime:
        seen.update(given, model=model)
        return FakeRuntime()

    monkeypatch.setattr(exl_runtime.runtime, "load", load)
    line = "run m -p q --device cpu --backend reference --context 2k --cache bf16 --threads 3 --template t.jinja"
    line += " --draft d --speculate draft --accuracy fast --no-packed-cache --host-cache 8G"
    assert exl(*line.split(" ")) == 0
    del seen["progress"]
    assert seen == {
        "model": "m",
        "device": "cpu",
        "gpu_split": None,
        "backend": "reference",
        "context": 2048,
        "cache": "bf16",
        "accuracy": "fast",
        "threads": 3,
        "step_tokens": 512,
        "template": "t.jinja",
        "draft": "d",
        "speculate": "draft",
        "packed_cache": False,
        "host_cache": 8 << 30,
    }


def raising(error: BaseException):
    def program(*arguments: object) -> int:
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            CheckpointError("bad \x1b[31mname\x07", hint="fix\x9bit"),
            2,
            ["exl: bad \\x1b[31mname\\x07", "hint: fix\\x9bit"],
        ),
        (KeyboardInterrupt(), 130, []),
        (PermissionError(13, "Permission denied", "a/b"), 2, ["Permission denied: a/b"]),
        (MemoryError(), 2, ["out of memory"]),
        (ZeroDivisionError("oops\x1b"), 1, ["bug", "ZeroDivisionError: oops\\x1b", "-v"]),
        (RecursionError("deep"), 1, ["bug"]),
    ],
)
def test_errors_become_messages_and_codes(
    error: BaseException,
    code: int,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["exl"])
    assert main.guarded(raising(error)) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err and "\x1b" not in err and "\x07" not in err
    for word in words:
        assert word in err
    for setting in ("argument", "environment"):
        monkeypatch.setattr(sys, "argv", ["exl", "-v"] if setting == "argument" else ["exl"])
        monkeypatch.setenv("EXL_DEBUG", "1" if setting == "environment" else "")
        main.guarded(raising(error))
        assert ("Traceback" in capsys.readouterr().err) is not isinstance(error, KeyboardInterrupt)


def test_a_reader_that_goes_away_is_no_error(repo: Path) -> None:
    script = "import sys\nfrom exl_runtime.cli import main\ndef p():\n while True: print('x', flush=True)\n"
    script += "sys.exit(main.guarded(p))"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == ""


def summary(**changes: object) -> SimpleNamespace:
    from exl_runtime.model.summary import KindSummary, ModelSummary

    values = {"name": "model\x1b[31m", "path": "a/b", "architecture": "Fake", "format": "exl2", "parameters": 5_770_496}
    values |= {"bits_per_weight": 4.25, "file_bytes": 4_000_000, "weight_bytes": 3_000_000, "context_length": 1024}
    values |= {"context": 512, "cache_dtype": "fp32", "cache_bytes": 1 << 20, "working_bytes": 1 << 20}
    values |= {"total_bytes": 5 << 20, "free_bytes": 1 << 30}
    kind = KindSummary(kind="attention", matrices=24, weights=1_000_000, bits_per_weight=4.2, formats=("exl2",))
    return ModelSummary(kinds=(kind,), **(values | changes))


def test_info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import exl_runtime.model.summary

    seen = []

    def look(folder: Path, context: int | None, *, cache: str, device: str) -> object:
        seen.append((folder, context, cache, device))
        return summary()

    monkeypatch.setattr(exl_runtime.model.summary, "summarize", look)
    assert exl("info", str(tmp_path), "--context", "512") == 0
    out = capsys.readouterr().out
    for word in ("model\\x1b[31m", "Fake", "4.25", "5,770,496", "attention", "4.20", "512 tokens", "fits", "5.0 MiB"):
        assert word in out
    assert "\x1b" not in out
    assert exl("info", str(tmp_path), "--json", "--cache", "k6v4", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["kinds"][0]["matrices"] == 24
    assert seen[0][1:3] == (512, "auto") and seen[1][1:] == (None, "k6v4", "cpu")
    assert exl("info", str(tmp_path), "--cache", "k6v9") == 2
    assert "'k6v9' is no cache type: use auto, fp32, fp16, bf16, q8, q6, q4, or kXvY" in capsys.readouterr().err
    assert exl("info", str(tmp_path / "absent")) == 2


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from exl_runtime.ops import native
    from ext.doctor import Check

    checks = [Check("python", True, "3.11", "never shown"), Check("gpu", None, "none", "optional")]
    done = []
    monkeypatch.setenv("EXL_CACHE_DIR", str(tmp_path))
    packed = tmp_path / "packed" / "a-00-11.packed"
    packed.parent.mkdir()
    packed.write_bytes(bytes(3000))
    monkeypatch.setattr(native, "doctor_checks", lambda: checks, raising=False)
    monkeypatch.setattr(native, "clean_cache", lambda: done.append("clean") or 2048, raising=False)
    monkeypatch.setattr(native, "ensure_loaded", lambda: done.append("build"))
    assert exl("doctor") == 0
    out = capsys.readouterr().out
    assert "python" in out and "never shown" not in out and "→ optional" in out
    assert "packed models" in out and "1 model, 2.9 KiB" in " ".join(out.split())
    checks.append(Check("compiler", False, "no g++", "install one"))
    assert exl("doctor") == 1
    assert "MISSING" in capsys.readouterr().out
    assert exl("doctor", "--json") == 1
    assert json.loads(capsys.readouterr().out)[2]["ok"] is False
    assert packed.exists()
    assert exl("doctor", "--clean") == 0 and done == ["clean"]
    err = capsys.readouterr().err
    assert "2.0 KiB" in err and "2.9 KiB" in err and not packed.exists()
    assert exl("doctor", "--clean", "--build") == 1 and done == ["clean", "clean", "build"]


@pytest.mark.parametrize("command", ["convert", "eval", "bench"])
def test_other_programs_get_their_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    seen = []

    def run_module(name: str, **given: object) -> None:
        seen.append((name, sys.argv[1:]))
        raise SystemExit(3)

    monkeypatch.setattr(runpy, "run_module", run_module)
    before = sys.argv
    assert exl(command, "--anything", "x") == 3
    assert sys.argv is before
    name, arguments = seen[0]
    assert name == ("convert" if command == "convert" else "eval") and arguments[-2:] == ["--anything", "x"]


def test_convert_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exl("--help") == 0
    assert "make an EXL2 model out of an fp16, bf16, GPTQ or EXL2 one" in " ".join(capsys.readouterr().out.split())
    assert exl("convert", "--help") == 0
    assert "usage: exl convert -i" in capsys.readouterr().out


def test_commands_are_all_wired() -> None:
    assert set(main.COMMANDS) == {"chat", "run", "serve", "info", "doctor"}
    for module in (chat, run, info, doctor):
        assert module.HELP and module.USAGE
    assert cli.__doc__
