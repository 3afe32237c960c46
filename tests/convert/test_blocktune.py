"""Tuning a layer behind its encoding: nearer to the source on new rows, stored values only, the same every time."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from converting import Quiet, convert, in_a_hurry, options, small_model
from oracles import same_bits
from safetensors.torch import load_file
from tiny_layers import TinyModel, even, ids_of, open_tiny
from torch import Tensor

from convert import blocktune, encoding, fisher
from convert.blocktune import GUARD, Tuned, decide, fits, tune_layer
from convert.encoder import BEST
from convert.forward import Model
from convert.layerpass import LayerPass, Plan
from convert.measuring import measuring_rows
from convert.source import Source
from convert.states import States
from convert.tune import Rates
from convert.workspace import open_workspace

FAMILIES = ("qwen3", "llama_bias", "mixtral", "gemma2")
ROWS, LENGTH = 64, 24
FAST = Rates(code=0.01, scale=0.02, dense=0.02)
WILD = Rates(code=1e3, scale=1e3, dense=1e3)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    root = tmp_path_factory.mktemp("blocktune")
    return cache(lambda name: open_tiny(name, root, LENGTH))


@dataclass
class Ran:
    """Layer 0, encoded at 3 bits, made worse, and tuned."""

    run: LayerPass
    before: States
    first: dict[str, Tensor]  # weights before tuning
    tuned: Tuned

    def error(self, x: Tensor, w: dict[str, Tensor], metric: Tensor) -> float:
        """Mean e^T F e of the layer's outputs on x, seen by the source as it is and by the result a little off."""
        with torch.no_grad():
            off = self.run.forward(drifted(x), w) - self.run.forward(x, self.run.weights)
        return float(((off @ metric) * off).sum(-1).mean())


def drifted(x: Tensor) -> Tensor:
    return x + 0.02 * x.roll(1, -1)


def states(values: Tensor) -> States:
    held = States(tuple(values.shape))
    held.write(0, values)
    return held


def go(tiny: TinyModel, metric: Tensor | None = None, **changes) -> Ran:
    forward, weights, slots = tiny.layer(0)
    x = tiny.before(0, ids_of(ROWS, LENGTH, vocab=100))
    before = states(drifted(x))
    run = LayerPass(
        forward=forward,
        slots=slots,
        weights=weights,
        plan=Plan(layouts=even(slots, 3), recipe=BEST, correct=True, chunk=8),
        source=states(x),
        quantized=states(drifted(x)),
        keep=lambda width: States((ROWS, LENGTH, width)),
    )
    run.run()
    for key, done in run.done.items():  # scales that are too small: something that tuning can find
        done.encoded = replace(done.encoded, scale_max=(0.85 * done.encoded.scale_max.float()).half())
        run.result[key] = done.encoded.weight()
    first = dict(run.result)
    metric = torch.eye(x.shape[-1]) if metric is None else metric
    return Ran(
        run, before, first, tune_layer(run, before, metric, **{"seed": 3, "steps": 40, "rates": FAST, **changes})
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layer_comes_nearer_to_the_source_on_new_rows(name: str, opened) -> None:
    tiny = opened(name)
    ran = go(tiny)
    run, width = ran.run, tiny.model.spec.hidden_size
    assert 0 < ran.tuned.after < 0.95 * ran.tuned.before and ran.tuned.steps > 0
    new = tiny.before(0, ids_of(32, LENGTH, seed=1, vocab=100))
    assert ran.error(new, run.result, torch.eye(width)) < 0.95 * ran.error(new, ran.first, torch.eye(width))
    # What is returned is what will be stored, and the states are those behind it.
    assert set(run.result) == set(ran.first)
    for key, value in run.result.items():
        assert same_bits(value, run.done[key].encoded.weight() if key in run.done else value.half().float()), key
    assert any(not torch.equal(run.result[key], ran.first[key]) for key in run.result if key not in run.done)
    with torch.no_grad():
        wanted = run.forward(ran.before.read(0, ROWS), run.result)
    assert (run.quantized.read(0, ROWS) - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_same_seed_gives_the_same_layer(opened) -> None:
    one, two, other = (go(opened("qwen3"), seed=seed) for seed in (3, 3, 4))
    assert all(same_bits(value, two.run.result[key]) for key, value in one.run.result.items())
    assert any(not torch.equal(value, other.run.result[key]) for key, value in one.run.result.items())


def test_errors_count_by_what_they_cost(opened) -> None:
    """What is compared: e^T F e, F damped and scaled, over rows that are not tuned on."""
    tiny = opened("qwen3")
    root = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    metric = 1e-3 * root @ root.t()
    ran = go(tiny, metric)
    damped = (metric / metric.diagonal().mean() + blocktune.RIDGE * torch.eye(64)) / (1 + blocktune.RIDGE)
    new = tiny.before(0, ids_of(ROWS, LENGTH, vocab=100))[GUARD // 2 :: GUARD]
    for weights, said in ((ran.first, ran.tuned.before), (ran.run.result, ran.tuned.after)):
        assert said == pytest.approx(ran.error(new, weights, damped) / 64, rel=1e-3)
    assert ran.tuned.after < 0.95 * ran.tuned.before


@pytest.mark.parametrize("rates", [WILD, Rates(code=float("nan"), scale=0.0, dense=0.0)])
def test_what_does_not_help_changes_nothing(rates: Rates, opened) -> None:
    ran = go(opened("qwen3"), rates=rates, steps=4)
    assert ran.tuned.steps == 0 and ran.tuned.after == ran.tuned.before
    assert all(same_bits(value, ran.first[key]) for key, value in ran.run.result.items())


def test_rows_that_decide_are_not_tuned_on(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is told by the states before the layer; those read with gradients on are tuned on."""
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    real = States.read

    def read(self: States, start: int, stop: int) -> Tensor:
        seen[torch.is_grad_enabled()].update(range(start, stop))
        return real(self, start, stop)

    monkeypatch.setattr(blocktune, "through", lambda *rest: None)
    with torch.no_grad():
        monkeypatch.setattr(LayerPass, "run", watched(LayerPass.run, lambda: monkeypatch.setattr(States, "read", read)))
        go(opened("qwen3"))
    assert len(seen[True]) == ROWS - ROWS // GUARD and len(seen[False]) == ROWS // GUARD
    assert not seen[True] & seen[False]


def watched(call: Callable, after: Callable[[], None]) -> Callable:
    def wrapper(*args):
        result = call(*args)
        after()
        return result

    return wrapper


@pytest.mark.parametrize("fisher_", [torch.zeros(8, 8), torch.full((8, 8), float("nan")), -torch.eye(8)])
def test_a_useless_metric_counts_as_plain_squares(fisher_: Tensor) -> None:
    assert torch.equal(blocktune._root(fisher_), torch.eye(8))


# --- the Fisher information, and the stage --------------------------------------------------------------------------


@pytest.fixture
def space(tmp_path: Path):
    folder = small_model("llama", tmp_path)
    with (
        Source.open(folder) as source,
        open_workspace(tmp_path / "w", options(folder, tmp_path / "out"), source.identity(), 1 << 30) as found,
    ):
        yield source, found


def test_fisher_information_is_that_of_every_layers_outputs(space, monkeypatch: pytest.MonkeyPatch) -> None:
    source, work = space
    rows = ids_of(6, 16, vocab=70)
    drawn: list[Tensor] = []
    real = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    fisher.collect(source, work, rows, 4, 5, Quiet())
    tokens = torch.cat(drawn).view(rows.shape)
    model = Model.load(source, 16)
    x = model.layers[0](torch.nn.functional.embedding(measuring_rows(rows), model.embedding), model.weights[0])
    x = x.detach().requires_grad_(True)
    y = model.layers[1](x, model.weights[1])
    y.retain_grad()
    scores = torch.log_softmax(encoding.rms_norm(y, model.final_norm, source.spec.norm_eps, 0.0) @ model.head, -1)
    scores.gather(-1, tokens[..., None]).sum().backward()
    for i, held in enumerate((x, y)):
        g = held.grad.flatten(0, 1)
        wanted = g.t() @ g / g.shape[0]
        assert (load_file(work.fisher(i))["fisher"] - wanted).norm() <= 1e-4 * wanted.norm()


def test_fisher_information_is_made_again_where_it_is_missing(space, monkeypatch: pytest.MonkeyPatch) -> None:
    source, work = space
    rows = ids_of(6, 16, vocab=70)
    fisher.collect(source, work, rows, 4, 5, Quiet())
    files = [work.fisher(i) for i in range(2)]
    made = [path.read_bytes() for path in files]
    files[1].unlink()
    fisher.collect(source, work, rows, 4, 5, Quiet())
    assert [path.read_bytes() for path in files] == made
    monkeypatch.setattr(fisher, "forward_states", None)
    fisher.collect(source, work, rows, 4, 5, Quiet())


def test_it_is_skipped_without_memory_or_rows_and_that_is_written_down(space) -> None:
    source, work = space
    assert fits(source, 1 << 30, 16, 512) and not fits(source, 1 << 30, 15, 512)
    assert not fits(source, 1 << 20, 16, 512)
    assert not decide(source, work, 1 << 20, 16, 512)
    assert not decide(source, work, 1 << 30, 16, 512)


def test_a_job_tunes_its_layers_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_model("llama", tmp_path)
    called: list[int] = []
    with in_a_hurry():
        real = encoding.tune_layer
        monkeypatch.setattr(encoding, "tune_layer", lambda *a, **k: called.append(1) or real(*a, **k))
        convert(options(source, tmp_path / "out", bits=3.5))
        assert len(called) == 2
        monkeypatch.setattr(blocktune, "LEAST_GUARD_TOKENS", 10**9)
        convert(options(source, tmp_path / "plain", bits=3.5))
        convert(options(source, tmp_path / "classic", bits=6.0, encoder="classic"))
    assert len(called) == 2
    said = {n: str(json.loads((tmp_path / n / "report.json").read_text())["calibration"]) for n in ("out", "plain")}
    assert "layers tuned behind" in said["out"] and "layers tuned behind" not in said["plain"]
