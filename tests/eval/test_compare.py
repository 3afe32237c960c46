"""`compare`: figures are those of the measures themselves, one model is open at a time, flaws are rows."""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eval.commands import compare as command
from eval.compare import Job, jobs_of, matrices, measure_all
from eval.comparison import Comparison, lines
from eval.data import from_files
from eval.protocol import Protocol, Window, windows
from eval.saved import read_measurements
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import DataError, OutOfMemory, UsageError
from exl_runtime.model.summary import summarize
from exl_runtime.runtime import load
from exl_runtime.tokenizer.tokenizer import Tokenizer

LENGTH, ROWS = 48, 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("Once upon a time there was a small fire that wanted to see the sea. It asked the wind.\n" * 20)
    return path


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser)
    return parser.parse_args(given)


@pytest.fixture
def run(text: Path, tmp_path: Path):
    """The command with small windows and its own place for references."""

    def go(*given: str):
        small = ("--data", str(text), "--length", str(LENGTH), "--rows", str(ROWS), "--threads", "1")
        kept = ("--reference-cache", str(tmp_path / "references"))
        return command.run(arguments(*given, *small, *kept), QuietReporter(program="eval"))

    return go


def some_windows(text: Path, model: Path) -> list[Window]:
    protocol = Protocol(name="gptq", length=LENGTH, stride=LENGTH, rows=ROWS)
    return list(windows(protocol, from_files([text]), Tokenizer.open(model)))


@pytest.fixture
def stranger(tmp_path: Path, demo: Path) -> Path:
    """The demo with two tokens of its vocabulary exchanged."""
    folder = tmp_path / "stranger"
    shutil.copytree(demo, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, other = [name for name in vocab if len(name) > 3 and name.isalpha()][:2]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_figures_are_those_of_the_measures(run, text: Path, demo: Path, ember: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    outcome = run("demo", str(ember), "--reference", str(ember), "-o", str(out), "--context", "512")
    assert outcome.code == 0
    first, second = outcome.facts["rows"]
    assert (first["name"], second["name"]) == ("demo", ember.name)
    found = some_windows(text, ember)
    for row, folder in ((first, demo), (second, ember)):
        alone = oracle(folder, found)
        assert row["nll"] == pytest.approx(alone.nll, rel=1e-6)  # the one in float64, the other in float32
        assert row["nll_stderr"] == pytest.approx(alone.stderr, rel=1e-4)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]), rel=1e-12)
        known = summarize(folder, 512, cache="auto")
        assert row["memory_bytes"] == known.total_bytes and row["file_bytes"] == known.file_bytes
        assert row["bits_per_weight"] == known.bits_per_weight and row["context"] == 512
        assert (row["tokens"], row["windows"]) == (ROWS * (LENGTH - 1), ROWS)
    assert first["kl_mean"] == pytest.approx(float(naive_kl(ember, demo, found)), rel=1e-3)
    assert first["kl_mean"] > 1e-3 and second["kl_mean"] < 1e-6
    assert first["head_bits"] == next(k.bits_per_weight for k in summarize(demo).kinds if k.kind == "head")
    assert outcome.facts["noise_floor"]["mean"] < first["kl_mean"]
    assert list(outcome.facts["layers"]) == [str(demo)], "the source itself needs no errors of matrices"
    for part in ("protocol: gptq: story.txt", "conditions: cache", f"{first['kl_mean']:.5f}", f"report: {out}"):
        assert part in outcome.text
    saved = read_measurements(out)
    assert [row.kl for row in saved.rows] == [first["kl_mean"], second["kl_mean"]]
    json.dumps(outcome.facts, allow_nan=False)


def oracle(folder: Path, found: list[Window]):
    from eval.perplexity import measure

    with load(folder, threads=1, context=256) as runtime:
        return measure(runtime, found)


def naive_kl(source: Path, model: Path, found: list[Window]):
    """Mean KL from whole logits in float64."""
    import torch

    with load(source, threads=1, context=256) as a, load(model, threads=1, context=256) as b:
        each = []
        for window in found:
            p, q = (x.logits(window.ids)[window.first - 1 : -1].double().log_softmax(-1) for x in (a, b))
            each.append((p.exp() * (p - q)).sum(-1))
        return torch.cat(each).mean()


def test_flaws_are_rows_and_the_others_go_on(run, stranger: Path, ember: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    outcome = run(absent, str(stranger), "demo", "--reference", str(ember), "--no-noise-floor")
    assert outcome.code == 2
    rows = outcome.facts["rows"]
    assert [row["problem"] is None for row in rows] == [False, False, True]
    assert "there is no folder" in rows[0]["problem"] and "cannot be compared" in rows[1]["problem"]
    assert all("\n" not in row["problem"] for row in rows[:2])
    assert rows[2]["kl_mean"] > 0 and rows[1]["bits_per_weight"] > 0, "what headers say stays"
    assert "not measured: stranger, fp32: " in outcome.text


def test_without_a_reference_the_first_model_sets_the_tokenizer(run, stranger: Path, tmp_path: Path) -> None:
    outcome = run(str(tmp_path / "absent"), "demo", str(stranger))
    assert outcome.code == 2
    problems = [row["problem"] for row in outcome.facts["rows"]]
    assert problems[1] is None and "demo and stranger cannot be compared" in problems[2]
    assert outcome.facts["rows"][1]["perplexity"] > 1 and "KL mean" not in outcome.text
    assert outcome.facts["reference"] is None and "divergence" not in outcome.facts["rows"][1]


def test_a_model_that_does_not_open_sets_nothing(text: Path, stranger: Path, demo: Path) -> None:
    def opened(model: str, cache: str):
        if model == str(stranger):
            raise OutOfMemory("too large")
        return load(model, cache=cache, threads=1, context=64)

    jobs = jobs_of([str(stranger), str(demo)], ["fp32"])
    rows, _ = measure_all(jobs, opened, some_windows(text, demo), ROWS, QuietReporter(program="eval"))
    assert [row.problem for row in rows] == ["too large", ""]


def test_every_cache_type_is_a_row(run, ember: Path) -> None:
    outcome = run("demo", "--cache", "fp32,bf16,fp32", "--reference", str(ember), "--no-noise-floor")
    rows = outcome.facts["rows"]
    assert [row["cache"] for row in rows] == ["fp32", "bf16"]
    assert rows[0]["cache_bytes_per_token"] == 2 * rows[1]["cache_bytes_per_token"]
    assert rows[0]["memory_bytes"] > rows[1]["memory_bytes"] and rows[0]["kl_mean"] != rows[1]["kl_mean"]
    assert outcome.text.splitlines()[0].split()[:2] == ["model", "cache"]


def test_what_concerns_all_models_is_an_error(run, tmp_path: Path, ember: Path) -> None:
    with pytest.raises(UsageError, match="its folder does not exist"):
        run("demo", "-o", str(tmp_path / "no" / "page.html"))
    with pytest.raises(UsageError, match="a folder"):
        run("demo", "-o", str(tmp_path))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(DataError, match="one window"):
        given = arguments("demo", "--data", str(short), "--length", "64", "--threads", "1")
        command.run(given, QuietReporter(program="eval"))
    with pytest.raises(SystemExit):
        arguments("demo", "--cache", "q3")


def test_one_model_is_open_at_a_time_and_ctrl_c_keeps_the_rows(text: Path, demo: Path, ember: Path) -> None:
    events: list[str] = []

    @contextmanager
    def opened(model: str, cache: str) -> Iterator[object]:
        if events.count("open") == 1:
            raise KeyboardInterrupt
        events.append("open")
        with load(model, cache=cache, threads=1, context=64) as runtime:
            yield runtime
        events.append("close")

    jobs = [Job(str(folder), cache) for cache in ("fp32", "fp16") for folder in (demo, ember)]
    rows, interrupted = measure_all(jobs, opened, some_windows(text, demo), ROWS, QuietReporter(program="eval"))
    assert interrupted and [row.path for row in rows] == [str(demo)] and events == ["open", "close"]
    assert not rows[0].partial and rows[0].windows == ROWS
    shown = lines(Comparison(command="compare", protocol="p", rows=tuple(rows), windows=ROWS, interrupted=True))
    assert "PARTIAL: the work was interrupted" in shown
    assert Comparison(command="compare", protocol="p", rows=(), windows=1, interrupted=True).code == 130


def test_ctrl_c_inside_a_model_gives_a_partial_row(text: Path, demo: Path) -> None:
    found = some_windows(text, demo)

    class Interrupted:
        def __iter__(self) -> Iterator[Window]:
            yield from found[:2]
            raise KeyboardInterrupt

    def opened(model: str, cache: str):
        return load(model, cache=cache, threads=1, context=64)

    jobs = [Job(str(demo), "fp32"), Job(str(demo), "fp16")]
    rows, interrupted = measure_all(jobs, opened, Interrupted(), ROWS, QuietReporter(program="eval"))
    assert interrupted and len(rows) == 1 and rows[0].partial and rows[0].windows == 2
    shown = lines(Comparison(command="compare", protocol="p", rows=tuple(rows), windows=ROWS, interrupted=True))
    assert f"PARTIAL: {demo.name}, fp32: 2 of {ROWS} windows" in shown


def test_ctrl_c_before_anything_passes_through(text: Path, demo: Path) -> None:
    def opened(model: str, cache: str):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_all([Job(str(demo), "fp32")], opened, [], 0, QuietReporter(program="eval"))


def test_matrices_of_what_is_quantized(demo: Path, ember: Path, tmp_path: Path) -> None:
    from eval.compare import described

    rows = [described(Job(str(folder), "fp32"), folder.name) for folder in (demo, ember, tmp_path)]
    errors, flaws, interrupted = matrices(rows, ember, QuietReporter(program="eval"))
    assert list(errors) == [str(demo)] and not flaws and not interrupted
    errors, flaws, _ = matrices(rows, tmp_path, QuietReporter(program="eval"))
    assert not errors and "no config.json" in flaws[str(demo)]


def test_jobs_and_their_names(demo: Path, tmp_path: Path) -> None:
    assert jobs_of(["b", "a", "b"], ["q8", "fp16"]) == [
        Job("b", "q8"),
        Job("b", "fp16"),
        Job("a", "q8"),
        Job("a", "fp16"),
    ]
    twins = [tmp_path / name / "same" for name in ("x", "y")]
    rows, _ = measure_all(
        jobs_of([str(twin) for twin in twins], ["fp32"]),
        lambda model, cache: pytest.fail("nothing to open"),
        [],
        0,
        QuietReporter(program="eval"),
    )
    assert [row.name for row in rows] == [str(twin) for twin in twins]
