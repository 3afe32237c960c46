"""`kld` from its arguments to its outcome."""

import json
from collections.abc import Callable
from pathlib import Path

import eval_models
import pytest
from eval_references import variant

from eval import divergence
from eval.commands import kld
from eval.outcome import Outcome
from exl_runtime.console.program import StrictParser
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import DataError, EvalError, OutOfMemory, UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_models.reader(tmp_path_factory.mktemp("models"), "qwen2")


@pytest.fixture(scope="module")
def model(source: Path) -> Path:
    return variant(source, source.parent / "noisy", 0.05)


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    path = source.parent / "text.txt"
    path.write_text("".join(f"Line {i} of a text about {i * i} things.\n" for i in range(60)))
    return path


@pytest.fixture
def call(source: Path, text: Path, tmp_path: Path) -> Callable[..., Outcome]:
    def run(*arguments: object, cache: bool = True) -> Outcome:
        parser = StrictParser(prog="kld")
        kld.add(parser)
        given = [str(x) for x in arguments]
        if "--data" not in given:
            given += ["--data", str(text)]
        if cache:
            given += ["--reference-cache", str(tmp_path / "cache")]
        return kld.run(parser.parse_args([*given, "--threads", "1"]), QuietReporter())

    return run


def test_the_outcome_holds_protocol_table_and_verdict(call, source: Path, model: Path, tmp_path: Path) -> None:
    outcome = call(model, "--reference", source, "--length", "64", "--rows", "5")
    assert outcome.code == 0
    lines = outcome.text.splitlines()
    assert lines[0].startswith("protocol: gptq: text.txt (sha256 ") and "windows of 64 tokens side by side" in lines[0]
    assert lines[1].startswith("model: noisy; cache fp32") and str(tmp_path / "cache") in lines[2]
    assert lines[3].startswith("scored: 315 tokens in 5 windows")
    assert lines[-1].startswith("verdict: ") and "times the noise floor" in lines[-1]
    found, floor = outcome.facts["divergence"], outcome.facts["noise_floor"]
    assert found["mean"] > floor["mean"] > 0 and found["tokens"] == 315
    (mean,) = (line for line in lines if line.startswith("mean  "))
    assert mean.split()[1:] == [f"{found['mean']:.6f}", f"{floor['mean']:.6f}"]
    (top1,) = (line for line in lines if line.startswith("same most likely token, %"))
    assert top1.split()[-2:] == [f"{100 * found['top1']:.2f}", f"{100 * floor['top1']:.2f}"]
    assert any(line.startswith("mean after 32 to 63 tokens") for line in lines)
    assert outcome.facts["times_noise_floor"] == pytest.approx(found["mean"] / floor["mean"])
    json.dumps(outcome.facts, allow_nan=False)

    again = call(model, "--reference", source, "--length", "64", "--rows", "5")
    assert again.facts["reference_reused"] and not outcome.facts["reference_reused"]
    beside = call(model, "--reference", source, "--length", "64", "--rows", "5", "--no-reference-cache", cache=False)
    assert beside.facts["reference_file"] is None
    for other in (again, beside):
        for part in ("divergence", "noise_floor"):
            assert {**other.facts[part], "seconds": 0} == {**outcome.facts[part], "seconds": 0}


def test_a_model_against_itself_is_within_the_noise_floor(call, source: Path) -> None:
    outcome = call(source, "--reference", source, "--length", "64", "--rows", "3")
    assert "verdict: within the noise floor" in outcome.text and outcome.facts["divergence"]["mean"] < 1e-7


@pytest.mark.parametrize(
    ("arguments", "name", "length", "rows"),
    [
        ((), "gptq", 512, 20),
        (("--rows", "3"), "gptq", 512, 3),
        (("--length", "128"), "gptq", 128, 20),
        (("--protocol", "llamacpp"), "llamacpp", 512, 20),
        (("--protocol", "llamacpp", "--length", "100", "--rows", "7"), "llamacpp", 100, 7),
    ],
)
def test_the_default_protocol(arguments: tuple[str, ...], name: str, length: int, rows: int, source: Path) -> None:
    parser = StrictParser(prog="kld")
    kld.add(parser)
    args = parser.parse_args([str(source), "--reference", str(source), *arguments])
    protocol = kld._protocol(args, QuietReporter())
    assert (protocol.name, protocol.length, protocol.stride, protocol.rows) == (name, length, length, rows)


def test_ctrl_c_shows_what_there_is(call, source: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = divergence._compare, []

    def some(*given: object) -> None:
        calls.append(given)
        if len(calls) > limit:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(divergence, "_compare", some)
    arguments = (model, "--reference", source, "--length", "64", "--rows", "3")
    limit = 2
    outcome = call(*arguments)
    assert outcome.code == 130 and outcome.facts["partial"] and outcome.facts["noise_floor"] is None
    assert "noise floor: unknown, as you stopped after 2 of 3 windows" in outcome.text
    assert "interrupted:" in outcome.text and "verdict" not in outcome.text
    calls.clear()
    limit = 3
    outcome = call(*arguments)
    assert outcome.code == 130 and "noise floor: unknown, as you stopped before it" in outcome.text
    assert not outcome.facts["divergence"]["partial"] and outcome.facts["partial"]
    calls.clear()
    limit = 5
    outcome = call(*arguments)
    assert outcome.code == 130 and "noise floor: of the first 2 of 3 windows" in outcome.text
    assert "times the noise floor" in outcome.text
    calls.clear()
    limit = 0
    with pytest.raises(KeyboardInterrupt):
        call(*arguments)


def test_without_a_noise_floor(call, source: Path, model: Path) -> None:
    outcome = call(model, "--reference", source, "--length", "64", "--rows", "2", "--no-noise-floor")
    assert outcome.code == 0 and outcome.facts["noise_floor"] is None and "noise floor: not asked for" in outcome.text


def test_a_noise_floor_that_fails_does_not_cost_the_figures(
    call, source: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OutOfMemory("too little memory", hint="buy some")

    monkeypatch.setattr(kld, "noise_floor", fail)
    outcome = call(model, "--reference", source, "--length", "64", "--rows", "2")
    assert outcome.code == 0 and outcome.facts["divergence"]["mean"] > 0 and not outcome.facts["partial"]
    assert "noise floor: unknown: too little memory" in outcome.text and outcome.facts["verdict"] is None


def test_clearing_the_cache(call, source: Path, model: Path, tmp_path: Path) -> None:
    call(model, "--reference", source, "--length", "64", "--rows", "2")
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    outcome = call("--clear-reference-cache")
    assert outcome.facts == {"folder": str(tmp_path / "cache"), "files": 2, "bytes": size} and "2 files" in outcome.text
    assert list((tmp_path / "cache").iterdir()) == []
    outcome = call(model, "--reference", source, "--length", "64", "--rows", "2", "--clear-reference-cache")
    assert not outcome.facts["reference_reused"]


def test_what_cannot_be_compared_is_one_line(call, source: Path, model: Path, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="qwen2-bos and demo cannot be compared"):
        call(demo, "--reference", source)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(DataError, match=r"short\.txt: 10 tokens, one window of the gptq protocol has 512"):
        call(model, "--reference", source, "--data", short)
    with pytest.raises(UsageError, match="--reference SOURCE is missing"):
        call(model)
    with pytest.raises(UsageError, match="MODEL is missing"):
        call("--reference", source)
