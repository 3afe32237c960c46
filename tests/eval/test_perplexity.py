"""Perplexity against transformers on the same weights, protocol by protocol; the command; and stopping early."""

import argparse
import json
import math
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import eval_models
import pytest
import tiny
import torch
from safetensors import safe_open

import exl_runtime as exl
from eval import perplexity
from eval.commands import perplexity as command
from eval.data import from_files
from eval.perplexity import measure
from eval.protocol import PRESETS, Protocol, Window, chosen_protocol, windows
from exl_runtime.console.program import StrictParser
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import DataError, EvalError
from exl_runtime.formats import dequantize

TEXT = "".join(f"{n}. The fox ran over {n * n} hills\n  and slept. Then it said: '{n}!'\n\n" for n in range(20))
SIZES = {"gptq": (48, None), "exl2": (48, 20), "llamacpp": (32, None), "stride": (48, 20)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def file(root: Path) -> Path:
    path = root / "story.txt"
    path.write_text(TEXT)
    return path


def options(*arguments: str) -> argparse.Namespace:
    parser = StrictParser()
    command.add(parser)
    return parser.parse_args(arguments)


def small(name: str, *more: str) -> Protocol:
    length, stride = SIZES[name]
    arguments = ["--protocol", name, "--length", str(length), *more]
    return chosen_protocol(options("model", *arguments, *(["--stride", str(stride)] if stride else [])))


# --- the oracle: what the published programs do, with transformers ----------------------------------------------------


def published(name: str, model: Any, ids: list[int], bos: int | None, length: int, stride: int, rows: int) -> float:
    """The mean negative log-likelihood of a preset, float64."""

    def losses(tokens: list[int]) -> torch.Tensor:
        """Of every token but the first."""
        logits = tiny.logits_of(model, tokens).double()
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")

    if name == "gptq":
        parts = [losses(ids[i * length :][:length]).mean() for i in range(len(ids) // length)]
        return float(torch.stack(parts).mean())
    if name == "exl2":
        starts = list(range(0, len(ids) - length, stride))[:rows]
        return float(torch.cat([losses(ids[a : a + length]) for a in starts]).mean())
    if name == "llamacpp":
        scored = []
        for chunk in range(len(ids) // length):
            tokens = ids[chunk * length :][:length]
            if bos is not None:
                tokens = [bos, *tokens[1:]]
            scored.append(losses(tokens)[length // 2 :])  # of the tokens length/2 + 1 and on
        return float(torch.cat(scored).mean())
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        labels = torch.tensor(ids[begin:end])
        labels[: -(end - previous)] = -100
        logits = tiny.logits_of(model, ids[begin:end]).double()
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100))
        count += int((labels[1:] != -100).sum())
        previous = end
        if end == len(ids):
            break
    return total / count


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("bos", [True, False])
def test_presets_equal_transformers_on_a_tiny_model(name: str, bos: bool, root: Path, file: Path) -> None:
    ids = [eval_models.BOS] * bos + eval_models.ids_of(TEXT)
    length, stride = SIZES[name]
    model = tiny.model_of(tiny.by_name("qwen2"))
    expected = published(name, model, ids, eval_models.BOS if bos else None, length, stride or length, rows=20)
    with exl.load(eval_models.reader(root, bos=bos), threads=1, context=64) as runtime:
        result = measure(runtime, windows(small(name), from_files([file]), runtime.tokenizer))
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_presets_equal_transformers_on_trained_models(quantized: bool, ember: Path, demo: Path, file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(ember, dtype=torch.float32)
    if quantized:
        install(model, demo)
    ids = transformers.AutoTokenizer.from_pretrained(ember)(TEXT)["input_ids"]
    with exl.load(demo if quantized else ember, threads=1, context=64, cache="fp32") as runtime:
        for name, (length, stride) in SIZES.items():
            expected = published(name, model, ids, None, length, stride or length, rows=6)
            protocol = small(name, *(["--rows", "6"] if name == "exl2" else []))
            result = measure(runtime, windows(protocol, from_files([file]), runtime.tokenizer))
            assert result.nll == pytest.approx(expected, rel=1e-5), name


def install(model: Any, folder: Path) -> None:
    """What the matrices in `folder` mean, as the weights of `model`."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                place, _, suffix = name.rpartition(".")
                tensors.setdefault(place, {})[suffix] = opened.get_tensor(name)
    with torch.no_grad():
        for place, group in tensors.items():
            weight = model.get_submodule(place).weight
            weight.copy_(dequantize(group).t() if "q_weight" in group else group["weight"])


# --- sums -------------------------------------------------------------------------------------------------------------


def made_up(monkeypatch: pytest.MonkeyPatch, values: list[list[float]]) -> list[Window]:
    """Windows whose tokens have these NLLs."""
    given = iter(values)
    monkeypatch.setattr(perplexity, "token_nll", lambda runtime, window: torch.tensor(next(given), dtype=torch.float64))
    return [Window(tuple(range(len(row) + 1)), 1) for row in values]


def test_the_standard_error_is_that_of_the_mean_over_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(40, 7, generator=generator, dtype=torch.float64) + 1e6  # large: squares would cancel
    result = measure(None, made_up(monkeypatch, values.tolist()))
    means = values.mean(dim=1)
    assert result.nll == pytest.approx(float(means.mean()), rel=1e-12)
    assert result.stderr == pytest.approx(float(means.std() / 40**0.5), rel=1e-6)
    assert (result.tokens, result.processed, result.windows, result.partial) == (280, 320, 40, False)
    assert result.perplexity == math.inf


def test_windows_of_unequal_size_count_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [[1.0, 2.0, 3.0], [4.0], [0.5, 0.5]]
    result = measure(None, made_up(monkeypatch, values))
    mean = 11 / 6
    squares = (6 - 3 * mean) ** 2 + (4 - mean) ** 2 + (1 - 2 * mean) ** 2
    assert result.nll == pytest.approx(mean) and result.perplexity == pytest.approx(math.exp(mean))
    assert result.stderr == pytest.approx(math.sqrt(squares * 3 / 2) / 6)


def test_one_window_has_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measure(None, made_up(monkeypatch, [[1.0, 2.0]]))
    assert math.isnan(result.stderr) and result.nll == 1.5


def test_no_window_at_all_is_one_line() -> None:
    with pytest.raises(EvalError, match="no window to score"):
        measure(None, [])


# --- the command ------------------------------------------------------------------------------------------------------


def arguments(model: Path, file: Path, *more: str) -> argparse.Namespace:
    return options(str(model), "--data", str(file), "--threads", "1", "--length", "48", *more)


@pytest.mark.parametrize("cache", ["fp32", "fp16"])
def test_the_command_gives_figures_and_protocol(cache: str, root: Path, file: Path) -> None:
    given = arguments(eval_models.reader(root), file, "--rows", "5", "--cache", cache)
    outcome = command.run(given, QuietReporter())
    assert outcome.code == 0
    facts = json.loads(json.dumps(dict(outcome.facts)))
    assert facts["windows"] == facts["windows_total"] == 5 and facts["tokens"] == 5 * 47 and facts["cache"] == cache
    assert facts["perplexity"] == pytest.approx(math.exp(facts["nll"])) and facts["partial"] is False
    for part in ("gptq: story.txt (sha256 ", "48 tokens side by side, the first 5", "BOS once", f"cache {cache}"):
        assert part in outcome.text and part in facts["protocol"]
    assert f"perplexity {facts['perplexity']:.4f} ± " in outcome.text
    assert "235 tokens scored in 5 windows" in outcome.text


def test_ctrl_c_shows_what_there_is(root: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity.token_nll
    calls = 0

    def stopping(runtime: Any, window: Window) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return whole(runtime, window)

    monkeypatch.setattr(perplexity, "token_nll", stopping)
    outcome = command.run(arguments(eval_models.reader(root), file), QuietReporter())
    assert outcome.code == 130 and outcome.facts["partial"] is True and outcome.facts["windows"] == 3
    assert f"PARTIAL: stopped after 3 of {outcome.facts['windows_total']} windows" in outcome.text
    calls = 0
    expected = command.run(arguments(eval_models.reader(root), file, "--rows", "3"), QuietReporter())
    assert expected.facts["nll"] == outcome.facts["nll"]
    calls = 3
    with pytest.raises(KeyboardInterrupt):
        command.run(arguments(eval_models.reader(root), file), QuietReporter())


def test_a_text_shorter_than_a_window_is_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match=r"short.txt: 10 tokens, one window of the gptq protocol has 48") as caught:
        command.run(arguments(eval_models.reader(root), tmp_path / "short.txt"), QuietReporter())
    assert "smaller --length" in (caught.value.hint or "")


def test_nan_in_the_logits_is_one_line(root: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def each_logits(self: Any, ids: Any, visit: Any, *, first: int = 0) -> None:
        visit(first, torch.full((len(ids) - first, 131), math.nan))

    monkeypatch.setattr(exl.Runtime, "each_logits", each_logits)
    with pytest.raises(EvalError, match="qwen2-bos: NaN or infinite logits after token 0 of a window of 48"):
        command.run(arguments(eval_models.reader(root), file), QuietReporter())


def test_a_vocabulary_too_small_for_the_text_is_one_line(root: Path, tmp_path: Path) -> None:
    """The tokenizer of another model."""
    folder = tmp_path / "mixed"
    shutil.copytree(eval_models.reader(root), folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["~"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    (tmp_path / "a.txt").write_text("a" * 60 + "~" * 60)
    with pytest.raises(EvalError, match=r"mixed: 500 is not a token id of this model \(0 to 130\)") as caught:
        command.run(arguments(folder, tmp_path / "a.txt"), QuietReporter())
    assert "its tokenizer belongs to another model" in (caught.value.hint or "")


def test_memory_is_that_of_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows come and go: none is kept."""
    alive: list[Any] = []

    class Marked:
        """A window that can be watched."""

        def __init__(self) -> None:
            self.ids, self.first = (1, 2), 1

    def stream() -> Iterator[Any]:
        for _ in range(200):
            window = Marked()
            alive.append(weakref.ref(window))
            yield window
            del window
            assert sum(ref() is not None for ref in alive) <= 2

    monkeypatch.setattr(perplexity, "token_nll", lambda runtime, window: torch.ones(1, dtype=torch.float64))
    assert measure(SimpleNamespace(), stream()).windows == 200
