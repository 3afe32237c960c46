"""KL and agreement: against transformers in float64, against themselves, and what a reader is told about them."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import eval_models
import numpy as np
import pytest
import torch
from eval_references import log_probabilities, options, some_windows, variant

import exl_runtime as exl
from eval import divergence as subject
from eval import logprobs, opening
from eval.divergence import RESOLUTION, Divergence, measure, noise_floor, times_floor, verdict
from eval.logprobs import decode, divergence, encode, nll
from eval.protocol import Window
from eval.reference import open_reference
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import EvalError, StorageError

QUIET = QuietReporter()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def source(root: Path) -> Path:
    return eval_models.reader(root, "qwen2")


@pytest.fixture(scope="module")
def noisy(source: Path, root: Path) -> Path:
    return variant(source, root / "noisy", 0.05)


def compared(source: Path, model: Path, windows: list[Window], cache: Path | None = None) -> Divergence:
    with (
        open_reference(source, options(cache), windows, QUIET) as reference,
        exl.load(model, threads=1, context=256) as runtime,
    ):
        return measure(reference, runtime, windows)


def exact(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    logp, logq = (x.double().log_softmax(dim=1) for x in (logp, logq))
    return (logp.exp() * (logp - logq)).sum(dim=1)


# --- the codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "spread"), [(131, 0.0), (131, 1.0), (131, 4.0), (131, 40.0), (4096, 12.0), (32000, 1.0), (32000, 12.0)]
)
def test_two_bytes_change_the_mean_by_less_than_a_millionth(vocab: int, spread: float) -> None:
    """From flat to one-hot distributions, and for models near and far."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, vocab, generator=generator) * spread
    p = torch.log_softmax(logits, dim=1)
    codes = encode(p)
    assert codes.dtype == np.uint16 and codes.shape == p.shape
    own = divergence(codes, p)
    assert own.min() > -1e-12 and own.mean() < 1e-7
    for noise in (0.01, 0.1):
        moved = logits + torch.randn(logits.shape, generator=generator) * noise * max(spread, 1.0)
        q = torch.log_softmax(moved, dim=1)
        error = divergence(codes, q) - exact(p, q).numpy()
        assert abs(error.mean()) < RESOLUTION, (vocab, spread, noise)


def test_rows_that_float32_left_unnormalized_do_not_matter() -> None:
    p = torch.log_softmax(torch.randn(5, 300, generator=torch.Generator().manual_seed(0)), dim=1)
    codes = encode(p + 3.0)
    assert (codes == encode(p)).all()
    assert divergence(codes, p - 2.0) == pytest.approx(divergence(codes, p), abs=1e-6)
    targets = torch.arange(5)
    assert nll(p + 0.5, targets) == pytest.approx(nll(p, targets), abs=1e-6)


def test_decoded_rows_are_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([[0.0, -1.0, -2.0, -300.0], [-50.0, -50.0, -50.0, -50.0]]).log_softmax(dim=1)
    decoded, logs = decode(encode(p))
    assert decoded.sum(axis=1) == pytest.approx([1.0, 1.0], abs=1e-15)
    assert decoded[0, 3] == 0.0 and np.isfinite(logs).all()
    assert logs[0, :3] == pytest.approx(p[0, :3].double().numpy(), abs=1e-4)
    whole = divergence(encode(p), p.flip(1))
    monkeypatch.setattr(logprobs, "_BLOCK", 1)
    assert (divergence(encode(p), p.flip(1)) == whole).all()


# --- the measure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("first", [1, 21])
def test_every_figure_against_transformers(family: str, first: int, root: Path, tmp_path: Path) -> None:
    source = eval_models.reader(root, family)
    model = variant(source, tmp_path / "model", 0.05)
    windows = some_windows(3, first)
    found = compared(source, model, windows)
    kl, top1, top5, lost = [], [], [], [[], []]
    for window in windows:
        p, q = (log_probabilities(folder, window) for folder in (source, model))
        targets = np.array(window.ids[first:])
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        best = p.argmax(axis=1)
        top1.append(q.argmax(axis=1) == best)
        top5.append((np.argsort(-q, axis=1)[:, :5] == best[:, None]).any(axis=1))
        for sums, x in zip(lost, (p, q), strict=True):
            sums.append(-x[np.arange(len(targets)), targets])
    all_kl = np.concatenate(kl)
    assert found.tokens == all_kl.size == 3 * (40 - first) and found.windows == 3 and not found.partial
    assert found.mean > 0.001
    assert found.mean == pytest.approx(all_kl.mean(), abs=RESOLUTION)
    assert found.median == pytest.approx(np.median(all_kl), abs=3e-5)
    assert found.p90 == pytest.approx(np.quantile(all_kl, 0.9), abs=3e-5)
    assert found.p99 == pytest.approx(np.quantile(all_kl, 0.99), abs=3e-5)
    assert found.max == pytest.approx(all_kl.max(), abs=3e-5)
    assert found.top1 == np.concatenate(top1).mean() and found.top5 == np.concatenate(top5).mean()
    assert found.nll_p == pytest.approx(np.concatenate(lost[0]).mean(), abs=1e-5)
    assert found.nll_q == pytest.approx(np.concatenate(lost[1]).mean(), abs=1e-5)
    assert found.perplexity_q == pytest.approx(math.exp(found.nll_q))
    # Windows of equal size: the standard deviation of their means over the root of their number.
    means = np.array([x.mean() for x in kl])
    assert found.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(3), abs=1e-6)
    edges = {1: [(1, 15), (16, 31), (32, 39)], 21: [(21, 31), (32, 39)]}[first]
    assert [(low, high) for low, high, _ in found.by_position] == edges
    for low, high, mean in found.by_position:
        part = np.concatenate([x[low - first : high - first + 1] for x in kl])
        assert mean == pytest.approx(part.mean(), abs=3e-6)


def test_a_model_is_no_distance_from_itself(source: Path, tmp_path: Path) -> None:
    for cache in (None, tmp_path):
        found = compared(source, source, some_windows(), cache)
        assert 0 <= found.mean < 1e-7 and found.max < 1e-6
        assert found.top1 == found.top5 == 1.0
        assert found.nll_p == pytest.approx(found.nll_q, abs=1e-12)


def test_more_noise_is_more_distance(source: Path, root: Path, tmp_path: Path) -> None:
    found = [
        compared(source, variant(source, tmp_path / str(scale), scale), some_windows(), root / "cache")
        for scale in (0.01, 0.03, 0.1, 0.3)
    ]
    assert [x.mean for x in found] == sorted(x.mean for x in found)
    assert [x.top1 for x in found] == sorted((x.top1 for x in found), reverse=True)


def test_fewer_bits_are_more_distance(shared: Path, tmp_path: Path) -> None:
    from exl_runtime.tokenizer.tokenizer import Tokenizer

    models = shared / "models"
    text = (shared / "data" / "wikitext2.test.raw").read_text(encoding="utf-8")[:4000]
    ids = Tokenizer.open(models / "ember-6m").encode(text)
    windows = [Window(tuple(ids[i : i + 256]), 1) for i in (0, 256)]
    four, three = (
        compared(models / "ember-6m", models / f"ember-6m-gptq-{name}", windows, tmp_path)
        for name in ("4bit-g128", "3bit-g64")
    )
    assert 0.01 < four.mean < 0.04 < three.mean < 0.2
    assert three.top1 < four.top1 < 1 and three.nll_q > four.nll_q > four.nll_p == three.nll_p


def test_ctrl_c_leaves_what_there_is(source: Path, noisy: Path) -> None:
    windows = some_windows(4)

    def interrupted_after(count: int) -> Callable[[int, str], None]:
        notes: list[str] = []

        def advance(n: int, note: str) -> None:
            assert n == 1 and note.startswith("KL 0.")
            notes.append(note)
            if len(notes) == count:
                raise KeyboardInterrupt

        return advance

    with (
        open_reference(source, options(), windows, QUIET) as reference,
        exl.load(noisy, threads=1, context=256) as runtime,
    ):
        part = measure(reference, runtime, windows, interrupted_after(2))
        whole = measure(reference, runtime, windows[:2])
        assert part.partial and replace(part, seconds=0, partial=False) == replace(whole, seconds=0)

        def none() -> Iterator[Window]:
            raise KeyboardInterrupt
            yield

        with pytest.raises(KeyboardInterrupt):
            measure(reference, runtime, none())
        with pytest.raises(EvalError, match="no window"):
            measure(reference, runtime, [])
        with pytest.raises(ValueError, match="not one that this reference"):
            measure(reference, runtime, [replace(windows[0], first=5)])


def test_another_number_of_logits_is_one_line(source: Path, demo: Path) -> None:
    windows = some_windows(1)
    with (
        open_reference(source, options(), windows, QUIET) as reference,
        exl.load(demo, threads=1, context=256) as runtime,
        pytest.raises(EvalError, match="demo has 2048 logits per token, the reference qwen2-bos has 131") as caught,
    ):
        measure(reference, runtime, windows)
    assert "\n" not in caught.value.problem


def test_one_window_has_no_standard_error(source: Path, noisy: Path) -> None:
    found = compared(source, noisy, some_windows(1))
    assert math.isnan(found.stderr) and found.facts()["stderr"] is None
    assert "nan" not in verdict(found, found)


# --- the noise floor --------------------------------------------------------------------------------------------------


def test_the_noise_floor_is_the_source_in_bf16_and_computed_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = some_windows()
    with exl.load(source, dtype="bf16", cache="bf16", threads=1, context=256) as half:
        expected = [half.logits(window.ids)[:-1].double().log_softmax(dim=1) for window in windows]
    with exl.load(source, dtype="fp32", cache="fp32", threads=1, context=256) as full:
        exact_kl = torch.cat(
            [exact(full.logits(window.ids)[:-1], q) for window, q in zip(windows, expected, strict=True)]
        )
    with open_reference(source, options(tmp_path), windows, QUIET) as reference:
        floor = noise_floor(reference, options(tmp_path), windows, QUIET)
        assert 1e-6 < floor.mean == pytest.approx(float(exact_kl.mean()), abs=RESOLUTION)
        monkeypatch.setattr(opening, "open_model", None)
        assert noise_floor(reference, options(tmp_path), windows, QUIET) == floor
    with open_reference(source, options(tmp_path), windows, QUIET) as reference:
        assert noise_floor(reference, options(tmp_path), windows, QUIET) == floor


@pytest.mark.parametrize("damage", ["{", "[]", '{"key": "other"}', None])
def test_a_damaged_noise_floor_is_computed_anew(damage: str | None, source: Path, tmp_path: Path) -> None:
    windows = some_windows(1)
    with open_reference(source, options(tmp_path), windows, QUIET) as reference:
        floor = noise_floor(reference, options(tmp_path), windows, QUIET)
        (path,) = tmp_path.glob("*.floor-bf16.json")
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({**facts, "by_position": 3}) if damage is None else damage)
        reporter = QuietReporter()
        again = noise_floor(reference, options(tmp_path), windows, reporter)
        (line,) = reporter.warned
        assert "is damaged; it is computed anew" in line and "\n" not in line
        assert again.mean == floor.mean and json.loads(path.read_text())["mean"] == floor.mean


def test_a_noise_floor_that_cannot_be_kept_is_given_all_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, reporter = some_windows(1), QuietReporter()
    with open_reference(source, options(tmp_path), windows, QUIET) as reference:

        def refuse(name: str, facts: object) -> None:
            raise StorageError("the disk is full")

        monkeypatch.setattr(reference, "remember", refuse)
        assert noise_floor(reference, options(tmp_path), windows, reporter).mean > 0
    assert reporter.warned == ["the noise floor is not kept: the disk is full"]


def test_an_interrupted_noise_floor_is_not_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = some_windows(2)
    real = subject.measure
    monkeypatch.setattr(subject, "measure", lambda *given: replace(real(*given), partial=True))
    with open_reference(source, options(tmp_path), windows, QUIET) as reference:
        assert noise_floor(reference, options(tmp_path), windows, QUIET).partial
    assert not list(tmp_path.glob("*.json"))


def test_the_verdict_says_what_a_difference_is_worth(source: Path, noisy: Path) -> None:
    base = compared(source, noisy, some_windows(2))
    floor = replace(base, mean=0.002, stderr=0.0001)
    far = replace(base, mean=0.0146, stderr=0.0001)
    assert verdict(far, floor).startswith("7.3 times the noise floor (mean KL 0.014600; the source itself in bf16:")
    assert times_floor(far, floor) == pytest.approx(7.3)
    assert verdict(replace(far, mean=0.0019), floor).startswith("within the noise floor")
    assert verdict(replace(far, mean=0.0022), floor).startswith("within the noise floor")  # by chance, as likely as not
    assert verdict(replace(far, mean=0.0025), floor).startswith("1.2 times")
    nothing = replace(floor, mean=0.0, stderr=0.0)
    assert verdict(replace(far, mean=5e-7, stderr=0.0), nothing).startswith("within the noise floor")
    assert times_floor(replace(far, mean=5e-6), nothing) == pytest.approx(5.0)


def test_facts_and_back(source: Path, noisy: Path) -> None:
    found = compared(source, noisy, some_windows(2))
    assert Divergence.from_facts(json.loads(json.dumps(found.facts(), allow_nan=False))) == found
    for wrong in ({}, {**found.facts(), "mean": "x"}, {**found.facts(), "tokens": None}):
        with pytest.raises(ValueError):
            Divergence.from_facts(wrong)
