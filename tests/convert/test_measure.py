"""Sensitivities against what they foretell: the divergence of the whole tiny model with one matrix exchanged."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_layers import TinyModel, ids_of, open_tiny
from torch import Tensor

from convert import measure as module
from convert.encoder import QUICK, attempt
from convert.forward import logits
from convert.measure import GROUP_SIZES, PRIOR, LayerProbe, Sensitivity, top_gradient
from convert.moments import Moments, factor
from exl_runtime.errors import ConvertError
from exl_runtime.formats.exl2 import WIDTHS

ROWS, LENGTH = 32, 40
SHARP = 2.0  # the head times this: probabilities as uneven as those of a trained model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measure")


@pytest.fixture(scope="module")
def opened(root: Path) -> Callable[[str], TinyModel]:
    """Tests leave the models as they are."""

    def sharp(name: str) -> TinyModel:
        tiny = open_tiny(name, root, LENGTH)
        tiny.model.head = tiny.model.head * SHARP
        return tiny

    return cache(sharp)


@pytest.fixture
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 64 only, where the sizes do not matter."""
    monkeypatch.setattr(module, "GROUP_SIZES", dict.fromkeys(WIDTHS, (64,)))


def probes(tiny: TinyModel, ids: Tensor, *, chunk: int = ROWS, kept: int = ROWS) -> list[LayerProbe]:
    """One probe per layer, through which all rows have gone, from the top down."""
    model, found = tiny.model, []
    x = tiny.before(len(model.layers), ids)
    gradient = top_gradient(model.spec, x, model.final_norm, model.head, torch.Generator().manual_seed(0))
    for i in reversed(range(len(model.layers))):
        forward, weights, slots = tiny.layer(i)
        probe = LayerProbe(forward, slots, weights, kept)
        x = tiny.before(i, ids)
        parts = zip(x.split(chunk), gradient.split(chunk), strict=True)
        gradient = torch.cat([probe.back(part, above) for part, above in parts])
        found.insert(0, probe)
    return found


def found_by(probe: LayerProbe) -> dict[str, Sensitivity]:
    """Slot key -> sensitivity; every matrix is announced."""
    notes: list[str] = []
    found = dict(zip(probe.slots, probe.sensitivities(notes.append), strict=True))
    assert notes == [slot.path for slot in probe.slots.values()]
    for key, item in found.items():
        slot = probe.slots[key]
        assert (item.path, item.inputs, item.outputs) == (slot.path, slot.inputs, slot.outputs)
        assert item.biased == slot.biased
    return found


# --- the figure itself -------------------------------------------------------------------------------------------


@torch.no_grad()
def divergence(tiny: TinyModel, i: int, x: Tensor, changed: dict[str, Tensor]) -> float:
    """Mean KL, nats per token, of the model with other matrices in layer i; x: the states before it."""

    def scores(w: dict[str, Tensor]) -> Tensor:
        y = model.layers[i](x, w)
        for layer, behind in zip(model.layers[i + 1 :], model.weights[i + 1 :], strict=True):
            y = layer(y, behind)
        return torch.log_softmax(logits(model.spec, y, model.final_norm, model.head).double(), dim=-1)

    model = tiny.model
    source = scores(model.weights[i])
    return float((source.exp() * (source - scores({**model.weights[i], **changed}))).sum(dim=-1).mean())


def foretold_and_measured(tiny: TinyModel, widths: tuple[int, ...], *keys: str) -> tuple[Tensor, Tensor]:
    """(widths, matrices) each; tokens of the second are not those of the first."""
    ids = ids_of(24, LENGTH, seed=9)
    foretold, real = [], []
    for i, probe in enumerate(probes(tiny, ids_of(ROWS, LENGTH, seed=1))):
        x = tiny.before(i, ids)
        for key, item in found_by(probe).items():
            if keys and not key.endswith(keys):
                continue
            factors = factor(probe._moments[key].hessian, damping=QUICK.damping)
            weights = [attempt(tiny.model.weights[i][key], factors, bits, 64).weight for bits in widths]
            foretold.append([sum(item.losses[bits, 64]) for bits in widths])
            real.append([divergence(tiny, i, x, {key: weight}) for weight in weights])
    return torch.tensor(foretold).t(), torch.tensor(real).t()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([t.flatten().argsort().argsort().double() for t in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_sensitivities_foretell_the_divergence(name: str, opened, one_size) -> None:
    foretold, real = foretold_and_measured(opened(name), (2, 4))
    assert rank_correlation(foretold, real) > 0.97
    assert all(rank_correlation(f, r) > 0.9 for f, r in zip(foretold, real, strict=True))
    ratio = foretold / real
    assert ((ratio > 0.5) & (ratio < 2)).float().mean() > 0.95
    assert 0.8 < float(ratio.median()) < 1.25
    assert real[0].max() > 0.05  # nats: large enough to be a test of the second order


def test_sensitivities_of_experts(opened, one_size) -> None:
    """Only part of the tokens visit each. That other tokens go elsewhere is beyond a gradient: no narrow bounds."""
    keys = ("0.gate_proj", "1.up_proj", "2.down_proj", "3.down_proj")
    foretold, real = foretold_and_measured(opened("mixtral"), (2, 3), *keys)
    assert rank_correlation(foretold, real) > 0.9
    ratio = foretold / real
    assert ratio.min() > 0.3 and ratio.max() < 2
    assert 0.6 < float(ratio.median()) < 1.5


def test_losses_are_the_quadratic_form(opened) -> None:
    """Without the correlation over tokens: half the mean squared gradient of a column times its output error."""
    tiny, ids = opened("llama"), ids_of(ROWS, LENGTH)
    probe = probes(tiny, ids, kept=0)[1]
    forward, weights, _ = tiny.layer(1)
    x = tiny.before(1, ids)
    with torch.no_grad():
        h = forward.attention_input(x, weights)
        middle = forward.attention_add(x, forward.attention_inner(h, weights), weights)
        inner = forward.mlp_inner(forward.mlp_input(middle, weights), weights).flatten(0, 1)
    power = gradient_behind(tiny, ids, 1).flatten(0, 1).double().square().mean(dim=0)
    h = (inner.t() @ inner).double() / inner.shape[0]
    h += QUICK.damping * h.diagonal().mean() * torch.eye(h.shape[0], dtype=torch.float64)
    found = found_by(probe)["down_proj"]
    factors = factor(probe._moments["down_proj"].hessian, damping=QUICK.damping)
    for (bits, size), row in found.losses.items():
        trial = attempt(weights["down_proj"], factors, bits, size)
        off = (weights["down_proj"] - trial.weight).double()
        assert sum(row) == pytest.approx(0.5 * float(((off * (h @ off)).sum(dim=0) * power).sum()), rel=2e-3)
        by_block = [0.5 * float((lost.double() * power).sum()) for lost in trial.rows_lost.split(32)]
        assert row == pytest.approx(by_block, rel=2e-3)


def gradient_behind(tiny: TinyModel, ids: Tensor, layer: int) -> Tensor:
    """Gradient at the outputs of `layer`, of a model without post norms also that at the outputs of its down_proj."""
    model = tiny.model
    x = tiny.before(layer + 1, ids).requires_grad_(True)
    y = x
    for forward, w in zip(model.layers[layer + 1 :], model.weights[layer + 1 :], strict=True):
        y = forward(y, w)
    y.backward(top_gradient(model.spec, y, model.final_norm, model.head, torch.Generator().manual_seed(0)))
    return x.grad


@pytest.mark.parametrize("name", ["llama_bias", "qwen3_moe"])
def test_more_bits_lose_less(name: str, opened) -> None:
    for item in found_by(probes(opened(name), ids_of(ROWS, LENGTH))[0]).values():
        assert set(item.losses) == {(bits, size) for bits, sizes in GROUP_SIZES.items() for size in sizes}
        assert all(len(row) == item.inputs // 32 and min(row) >= 0 for row in item.losses.values())
        totals = {place: sum(row) for place, row in item.losses.items()}
        for wide, narrow in zip((8, 6, 5, 4, 3), (6, 5, 4, 3, 2), strict=True):
            assert 0 < totals[wide, 128] < 0.5 * totals[narrow, 128]
        assert totals[3, 32] <= totals[3, 128] * 1.02


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "mixtral"])
def test_taps_are_the_gradients_of_outputs(name: str, opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes in, transposed, times the gradient of what comes out: autograd's gradient of the matrix."""
    tiny, ids = opened(name), ids_of(4, LENGTH)
    forward, weights, slots = tiny.layer(1)
    x = tiny.before(1, ids)
    above = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def spy(self: LayerProbe, inputs: dict[str, Tensor], taps: dict[str, Tensor], lead: tuple[int, ...]) -> None:
        caught.update({key: (into.detach(), taps[key].grad) for key, into in inputs.items()})
        original(self, inputs, taps, lead)

    original = LayerProbe._collect
    monkeypatch.setattr(LayerProbe, "_collect", spy)
    below = LayerProbe(forward, slots, weights, 0).back(x, above)

    theirs = {key: tensor.clone().requires_grad_() for key, tensor in weights.items()}
    x = x.clone().requires_grad_()
    forward(x, theirs).backward(above)
    assert (below - x.grad).abs().max() <= 1e-5 * x.grad.abs().max()
    assert caught.keys() == slots.keys()
    for key, (into, g) in caught.items():
        ours, wanted = into.flatten(0, -2).t() @ g.flatten(0, -2), theirs[key].grad
        assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max(), key
        if f"{key}.bias" in theirs:
            bias = theirs[f"{key}.bias"].grad
            assert (g.flatten(0, -2).sum(dim=0) - bias).abs().max() <= 1e-4 * bias.abs().max(), key


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_drawn_gradients_have_the_fisher_information(name: str, opened) -> None:
    """One hidden state, many draws: mean zero, covariance J^T (diag p - p p^T) J; gemma2 caps its logits."""
    model = opened(name).model
    state = opened(name).before(3, ids_of(1, 5))[:, 4]
    x = state.expand(30, 400, -1)
    g = top_gradient(model.spec, x, model.final_norm, model.head, torch.Generator().manual_seed(3)).flatten(0, 1)
    jacobian = torch.func.jacrev(lambda h: logits(model.spec, h, model.final_norm, model.head))(state[0]).double()
    p = torch.softmax(logits(model.spec, state[0], model.final_norm, model.head).double(), dim=-1)
    fisher = jacobian.t() @ (torch.diag(p) - p[:, None] * p) @ jacobian
    draws = len(g)
    assert g.double().mean(dim=0).norm() <= 4 * (fisher.trace() / draws).sqrt()
    seen = (g.double().t() @ g.double()) / draws
    assert (seen - fisher).norm() <= 0.1 * fisher.norm()


def test_draws_are_reproducible(opened) -> None:
    model, x = opened("llama").model, opened("llama").before(3, ids_of(2, LENGTH))
    one, two, three = (
        top_gradient(model.spec, x, model.final_norm, model.head, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert not x.requires_grad


# --- sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_rows_may_come_in_any_pieces(name: str, opened, one_size) -> None:
    """Also where the rows that are kept for the correlation end inside a piece."""
    tiny, ids = opened(name), ids_of(16, LENGTH)
    whole, pieces = (found_by(probes(tiny, ids, chunk=chunk, kept=11)[0]) for chunk in (16, 7))
    for key, item in whole.items():
        for place, row in item.losses.items():
            assert sum(pieces[key].losses[place]) == pytest.approx(sum(row), rel=2e-2), (key, place)
            if place[0] == 2:
                assert pieces[key].losses[place] == pytest.approx(row, rel=5e-2), (key, place)


def test_matrices_that_share_inputs_share_sums(opened) -> None:
    probe = probes(opened("llama"), ids_of(8, LENGTH))[0]
    held = probe._moments
    assert held["q_proj"] is held["k_proj"] is held["v_proj"] and held["gate_proj"] is held["up_proj"]
    assert {moments.tokens for moments in held.values()} == {8 * LENGTH} and probe.tokens == 8 * LENGTH


def test_errors_that_agree_over_tokens_count_more(opened) -> None:
    """By hand: rows of 5 tokens whose errors add up, cancel, or are one token's alone."""
    forward, weights, slots = opened("llama").layer(0)
    probe = LayerProbe(forward, slots, weights, 0)
    off = torch.ones(1, 1)
    into = torch.tensor([[[1.0]] * 5] * 3)

    def of(*g: float) -> float:
        probe._rows["q_proj"] = [(into[:2], torch.tensor(g)[None, :, None].expand(2, 5, 1))]
        probe._rows["q_proj"] += [(into[2:], torch.tensor(g)[None, :, None])]
        return probe._correlation("q_proj", off)

    assert of(2, 2, 2, 2, 2) == pytest.approx((5 * 3 + PRIOR) / (3 + PRIOR))
    assert of(1, -1, 2, -2, 0) == pytest.approx(PRIOR / (3 + PRIOR))
    assert of(0, 0, 7, 0, 0) == pytest.approx(1.0)
    assert of(0, 0, 0, 0, 0) == 1.0
    probe._rows["q_proj"] = []
    assert probe._correlation("q_proj", off) == 1.0


def test_agreement_multiplies_all_figures_of_a_matrix(opened, one_size) -> None:
    tiny, ids = opened("llama"), ids_of(ROWS, LENGTH)
    probe, blind = (probes(tiny, ids, kept=kept)[0] for kept in (ROWS, 0))
    alone, factors = found_by(blind), []
    for key, item in found_by(probe).items():
        weight = tiny.model.weights[0][key]
        off = attempt(weight, factor(probe._moments[key].hessian, damping=QUICK.damping), 3, 64).weight - weight
        factors.append(probe._correlation(key, off))
        for place, row in item.losses.items():
            assert row == pytest.approx([factors[-1] * x for x in alone[key].losses[place]], rel=1e-6)
    assert max(abs(one - 1) for one in factors) > 0.05


def test_a_sample_of_the_columns_tells_of_all(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probes(opened("llama"), ids_of(ROWS, LENGTH), kept=0)[0]
    whole = found_by(probe)
    monkeypatch.setattr(module, "COLUMNS", 24)
    for key, item in found_by(probe).items():
        for place in ((2, 64), (4, 128)):
            assert sum(item.losses[place]) == pytest.approx(sum(whole[key].losses[place]), rel=0.35), key
    assert module._columns(96, torch.device("cpu")).tolist() == list(range(0, 96, 4))
    assert module._columns(25, torch.device("cpu")).tolist() == list(range(0, 25, 2))
    assert module._columns(24, torch.device("cpu")).tolist() == list(range(24))


def test_an_expert_that_nobody_visits(opened) -> None:
    """No data, no loss at any width; the others have theirs."""
    forward, weights, slots = opened("mixtral").layer(0)
    probe = LayerProbe(forward, slots, weights, 4)
    weights["router"] = weights["router"].clone()
    weights["router"][:, 1], weights["router"][:, 2:] = -weights["router"][:, 0], 0.0  # 0 or 1, then the first zero
    probe.weights["router"] = weights["router"]
    x = opened("mixtral").before(0, ids_of(4, LENGTH))
    probe.back(x, torch.ones_like(x))
    for key, item in found_by(probe).items():
        losses = [x for row in item.losses.values() for x in row]
        assert (max(losses) == 0) == key.startswith("experts.3."), key
        assert [len(row) for row in item.losses.values()] == [item.inputs // 32] * 14


# --- the file ----------------------------------------------------------------------------------------------------


def entry() -> dict:
    losses = {
        (bits, size): tuple(4.0**-bits * (1 + size / 1000) * (1 + block) / 3 for block in range(3))
        for bits, sizes in GROUP_SIZES.items()
        for size in sizes
    }
    return Sensitivity(path="m.q", inputs=96, outputs=40, biased=True, losses=losses).to_json()


def test_measurements_survive_the_file() -> None:
    written = entry()
    read = Sensitivity.from_json("m.q", json.loads(json.dumps(written)), "measurement.json")
    assert (read.path, read.inputs, read.outputs, read.biased) == ("m.q", 96, 40, True)
    assert len(read.losses) == 14
    assert read.losses[3, 64] == pytest.approx([4.0**-3 * 1.064 * f / 3 for f in (1, 2, 3)], rel=1e-4)
    assert read.to_json() == written


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("inputs",), None),
        (("inputs",), "many"),
        (("inputs",), 0),
        (("inputs",), 100),
        (("inputs",), 128),
        (("inputs",), float("inf")),
        (("outputs",), 0),
        (("losses",), None),
        (("losses",), []),
        (("losses",), {}),
        (("losses", "3b_64g"), None),
        (("losses", "3b_64g"), [1.0, 2.0]),
        (("losses", "3b_64g"), [1.0, 2.0, "x"]),
        (("losses", "3b_64g"), [1.0, 2.0, -1e-9]),
        (("losses", "3b_64g"), [1.0, 2.0, float("nan")]),
        (("losses", "3b_64g"), [float("inf"), 2.0, 1.0]),
        (("losses", "7b_64g"), [1.0, 2.0, 3.0]),
        (("losses", "three"), [1.0, 2.0, 3.0]),
    ],
    ids=str,
)
def test_damaged_measurements(place: tuple[str, ...], value: object) -> None:
    damaged = entry()
    inside = damaged if len(place) == 1 else damaged["losses"]
    inside[place[-1]] = value
    with pytest.raises(ConvertError, match=r"measurement\.json: the entry of m\.q"):
        Sensitivity.from_json("m.q", damaged, "measurement.json")


@pytest.mark.parametrize("missing", ["inputs", "outputs", "biased", "losses"])
def test_incomplete_measurements(missing: str) -> None:
    damaged = entry()
    del damaged[missing]
    with pytest.raises(ConvertError, match="damaged"):
        Sensitivity.from_json("m.q", damaged, "measurement.json")
    for other in (None, [], 3, "text"):
        with pytest.raises(ConvertError, match="damaged"):
            Sensitivity.from_json("m.q", other, "measurement.json")
    empty = {**entry(), "inputs": 0, "losses": {key: [] for key in entry()["losses"]}}
    with pytest.raises(ConvertError, match="incomplete"):
        Sensitivity.from_json("m.q", empty, "measurement.json")
    lacking = entry()
    del lacking["losses"]["8b_128g"]
    with pytest.raises(ConvertError, match="incomplete"):
        Sensitivity.from_json("m.q", lacking, "measurement.json")


def test_moments_are_of_routed_tokens_only(opened) -> None:
    probe = probes(opened("mixtral"), ids_of(4, LENGTH))[0]
    counts = [probe._moments[f"experts.{e}.gate_proj"].tokens for e in range(4)]
    assert sum(counts) == 2 * 4 * LENGTH == 2 * probe.tokens and min(counts) > 0
    assert isinstance(probe._moments["experts.0.down_proj"], Moments)
