"""One layer of tiny models through the encoder: what every matrix sees and aims at, and the states that come out."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import same_bits
from tiny_layers import TinyModel, even, ids_of, open_tiny
from torch import Tensor

from convert import layerpass as module
from convert.encoder import BEST, CLASSIC, Recipe
from convert.layerpass import Assignment, Encoding, LayerPass, Plan, encode_matrix
from convert.moments import Moments
from convert.states import States

DENSE = ("llama_bias", "qwen3", "gemma2")
EXPERTS = ("mixtral", "qwen3_moe")
ROWS, LENGTH = 12, 40
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layerpass")


@pytest.fixture(scope="module")
def opened(root: Path) -> Callable[[str], TinyModel]:
    """Tests leave the models as they are."""
    return cache(lambda name: open_tiny(name, root, LENGTH))


@dataclass
class Ran:
    """A layer that went through, and the states before it: x of the source, y of the result."""

    run: LayerPass
    done: dict[str, Encoding]
    x: Tensor
    y: Tensor
    notes: list[str]

    @property
    def error(self) -> float:
        """Relative error of the layer's outputs."""
        with torch.no_grad():
            wanted = self.run.forward(self.x, self.run.weights)
        return float((self.run.quantized.read(0, ROWS) - wanted).norm() / wanted.norm())


def memory(width: int) -> States:
    return States((ROWS, LENGTH, width))


def filled(values: Tensor) -> States:
    states = States(tuple(values.shape))
    states.write(0, values)
    return states


def go(
    tiny: TinyModel,
    bits: int,
    *,
    correct: bool = True,
    recipe: Recipe = BEST,
    chunk: int = 6,
    drift: float = 0.05,
    keep: Callable[[int], States] = memory,
) -> Ran:
    """Layer 0, where the result's inputs are a little off already."""
    forward, weights, slots = tiny.layer(0)
    x = tiny.before(0, ids_of(ROWS, LENGTH))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    # half of the error depends on the inputs, as that of quantized layers does
    y = x + drift * x.norm() / x.numel() ** 0.5 * noise + drift * x.roll(1, -1)
    notes: list[str] = []
    run = LayerPass(
        forward=forward,
        slots=slots,
        weights=weights,
        plan=Plan(layouts=even(slots, bits), recipe=recipe, correct=correct, chunk=chunk),
        source=filled(x if correct else torch.full_like(x, float("nan"))),
        quantized=filled(y),
        keep=keep,
        advance=notes.append,
    )
    return Ran(run, run.run(), x, y, notes)


# --- the states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_states_end_behind_the_layer(name: str, correct: bool, opened) -> None:
    """The two models' own outputs, by one plain forward pass each over the weights."""
    ran = go(opened(name), 4, correct=correct)
    run = ran.run
    with torch.no_grad():
        quantized, source = run.forward(ran.y, run.result), run.forward(ran.x, run.weights)
    assert (run.quantized.read(0, ROWS) - quantized).norm() <= 1e-5 * quantized.norm()
    left = run.source.read(0, ROWS)
    if correct:
        assert (left - source).norm() <= 1e-5 * source.norm()
    else:
        assert left.isnan().all()  # neither read nor written
    assert ran.error > 0.01


@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_results_are_what_is_stored(name: str, opened) -> None:
    ran = go(opened(name), 4)
    run = ran.run
    assert ran.done.keys() == run.slots.keys()
    assert sorted(ran.notes) == sorted(slot.path for slot in run.slots.values())
    assert run.result.keys() == run.weights.keys()
    for key, stored in run.result.items():
        if key in run.slots:
            assert same_bits(stored, ran.done[key].encoded.weight()), key
            assert ran.done[key].encoded.layout == run.plan.layouts[key]
            assert 0.03 < ran.done[key].error < 0.15, key  # 4 bits
            assert ran.done[key].seconds > 0
        else:
            assert same_bits(stored, run.weights[key].half().float()), key


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_eight_bits_change_little(name: str, correct: bool, opened) -> None:
    """Errors of a few thousandths each; routers may send a token elsewhere when two experts are level."""
    ran = go(opened(name), 8, correct=correct, drift=0.0)
    assert ran.error < (0.02 if name in DENSE else 0.06)
    assert max(encoding.error for encoding in ran.done.values()) < 0.01


@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_aiming_at_the_source_lowers_the_error(name: str, opened) -> None:
    """The same recipe with and without it, where the inputs are off and at 3 bits."""
    tiny = opened(name)
    aimed, blind = go(tiny, 3, correct=True), go(tiny, 3, correct=False)
    assert aimed.error < 0.95 * blind.error


def test_the_whole_pipeline_beats_the_classic_one(opened) -> None:
    """Three layers after each other, each going on from what the one before left."""
    tiny = opened("llama")
    errors = []
    for correct, recipe in ((True, BEST), (False, CLASSIC)):
        x = tiny.before(0, ids_of(ROWS, LENGTH))
        source, quantized = filled(x), filled(x)
        for i in range(3):
            forward, weights, slots = tiny.layer(i)
            plan = Plan(layouts=even(slots, 3), recipe=recipe, correct=correct, chunk=8)
            LayerPass(
                forward=forward,
                slots=slots,
                weights=weights,
                plan=plan,
                source=source,
                quantized=quantized,
                keep=memory,
            ).run()
        wanted = tiny.before(3, ids_of(ROWS, LENGTH))
        errors.append(float((quantized.read(0, ROWS) - wanted).norm() / wanted.norm()))
    assert errors[0] < 0.75 * errors[1]


# --- how it is done does not matter ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_rows_at_a_time(name: str, opened) -> None:
    """Sums of other pieces differ in last bits: nearly all codes are the same, and the outputs as good."""
    whole, pieces = go(opened(name), 4, chunk=ROWS), go(opened(name), 4, chunk=3)
    for key, encoding in whole.done.items():
        equal = encoding.encoded.codes == pieces.done[key].encoded.codes
        assert equal.float().mean() > 0.97, key
        assert torch.equal(encoding.encoded.perm, pieces.done[key].encoded.perm), key
    assert pieces.error == pytest.approx(whole.error, rel=0.02)


@pytest.mark.parametrize("correct", [True, False])
def test_states_on_the_disk(correct: bool, tmp_path: Path, opened) -> None:
    """The same to the bit, and nothing is left behind."""
    made = []

    def keep(width: int) -> States:
        made.append(width)
        return States((ROWS, LENGTH, width), tmp_path / f"{len(made)}.f32")

    kept, held = go(opened("llama"), 4, correct=correct, keep=keep), go(opened("llama"), 4, correct=correct)
    assert sorted(made) == ([64, 64, 96, 96] if correct else [64, 96])
    assert not list(tmp_path.iterdir())
    assert same_bits(kept.run.quantized.read(0, ROWS), held.run.quantized.read(0, ROWS))


def test_experts_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, opened) -> None:
    whole = go(opened("mixtral"), 3)
    monkeypatch.setattr(module, "EXPERT_BYTES", 1)
    single = go(opened("mixtral"), 3)
    assert same_bits(whole.run.quantized.read(0, ROWS), single.run.quantized.read(0, ROWS))


# --- what each matrix sees ---------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Moments]]:
    """(weight, moments) of every matrix that is encoded."""
    calls: list[tuple[Tensor, Moments]] = []

    def spy(weight: Tensor, moments: Moments, *given, **options) -> Encoding:
        calls.append((weight, moments))
        return encode_matrix(weight, moments, *given, **options)

    monkeypatch.setattr(module, "encode_matrix", spy)
    return calls


def of(seen: list[tuple[Tensor, Moments]], run: LayerPass, key: str) -> Moments:
    return next(moments for weight, moments in seen if weight is run.weights[key])


def close(found: Tensor, inputs: Tensor) -> None:
    """`found` is the H of these inputs."""
    flat = inputs.reshape(-1, inputs.shape[-1]).double()
    wanted = flat.t() @ flat / flat.shape[0]
    assert (found.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["llama_bias", "gemma2"])
@pytest.mark.parametrize("correct", [True, False])
@torch.no_grad()
def test_inputs_of_the_matrices(name: str, correct: bool, opened, seen) -> None:
    """o and down behind the quantized neighbours, or in the classic order of things behind unquantized ones."""
    ran = go(opened(name), 3, correct=correct)
    run, f = ran.run, ran.run.forward
    neighbours = run.result if correct else run.weights
    h = f.attention_input(ran.y, run.result)
    inner = f.attention_inner(h, neighbours)
    middle = f.attention_add(ran.y, f.attention_inner(h, run.result), run.result)
    m = f.mlp_input(middle, run.result)
    for key in ("q_proj", "k_proj", "v_proj"):
        close(of(seen, run, key).hessian, h)
    close(of(seen, run, "o_proj").hessian, inner)
    for key in ("gate_proj", "up_proj"):
        close(of(seen, run, key).hessian, m)
    close(of(seen, run, "down_proj").hessian, f.mlp_inner(m, neighbours))
    assert [any(weight is run.weights[key] for weight, _ in seen) for key in run.slots] == [True] * 7
    other = f.attention_inner(h, run.weights if correct else run.result)
    with pytest.raises(AssertionError):  # the two differ enough to be told apart
        close(of(seen, run, "o_proj").hessian, other)


@torch.no_grad()
def test_targets_carry_the_error_of_the_stream(opened, seen) -> None:
    """o and down: the outputs of the source and what the stream before them lacks, least squares in float64."""
    ran = go(opened("llama"), 3)
    run, f = ran.run, ran.run.forward

    def solved(y_in: Tensor, x_in: Tensor, weight: Tensor, lacking: Tensor | None) -> np.ndarray:
        y, x, w = (t.reshape(-1, t.shape[-1]).double().numpy() for t in (y_in, x_in, weight))
        wanted = x @ w if lacking is None else x @ w + lacking.reshape(len(x), -1).double().numpy()
        ridge = np.sqrt(0.02 * np.mean(np.sum(y**2, axis=0)))
        tall, right = np.concatenate([y, ridge * np.eye(len(w))]), np.concatenate([wanted, ridge * w])
        return np.linalg.lstsq(tall, right, rcond=None)[0]

    def check(key: str, y_in: Tensor, x_in: Tensor, lacking: Tensor | None) -> None:
        weight = run.weights[key]
        wanted = solved(y_in, x_in, weight, lacking)
        ours = of(seen, run, key).target(weight).double().numpy()
        moved = np.linalg.norm(wanted - weight.double().numpy())
        assert moved > 0.01 * float(weight.norm())
        assert np.linalg.norm(ours - wanted) <= 1e-3 * moved, key

    hy, hx = f.attention_input(ran.y, run.result), f.attention_input(ran.x, run.weights)
    check("v_proj", hy, hx, None)
    iy, ix = f.attention_inner(hy, run.result), f.attention_inner(hx, run.weights)
    check("o_proj", iy, ix, ran.x - ran.y)
    y, x = f.attention_add(ran.y, iy, run.result), f.attention_add(ran.x, ix, run.weights)
    my, mx = f.mlp_input(y, run.result), f.mlp_input(x, run.weights)
    check("up_proj", my, mx, None)
    check("down_proj", f.mlp_inner(my, run.result), f.mlp_inner(mx, run.weights), x - y)


def test_behind_a_norm_the_stream_is_left_out(opened, seen) -> None:
    for name, expected in (("llama", {"o_proj", "down_proj"}), ("gemma2", set()), ("mixtral", {"o_proj"})):
        seen.clear()
        run = go(opened(name), 4).run
        assert {key for key in run.slots if of(seen, run, key).has_residual} == expected


@pytest.mark.parametrize("correct", [True, False])
@torch.no_grad()
def test_experts_see_the_tokens_routed_to_them(correct: bool, opened, seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Assignment", lambda routes, experts, wanted: Assignment(routes, experts, 0))
    ran = go(opened("mixtral"), 3, correct=correct)
    run, f = ran.run, ran.run.forward
    h = f.attention_input(ran.y, run.result)
    m = f.mlp_input(f.attention_add(ran.y, f.attention_inner(h, run.result), run.result), run.result)
    _, chosen, _ = f.route(m, run.result)
    flat = m.flatten(0, 1)
    for e in range(4):
        rows = flat[(chosen == e).any(dim=1)]
        moments = of(seen, run, f"experts.{e}.up_proj")
        assert moments.tokens == len(rows) > 0
        close(moments.hessian, rows)
        inner = f.expert_inner(rows, run.result if correct else run.weights, e)
        close(of(seen, run, f"experts.{e}.down_proj").hessian, inner)


def test_rare_experts_borrow_and_say_so(opened, seen) -> None:
    """An expert that the router never picks still gets rows: as many as its matrices are tall."""
    tiny = opened("qwen3_moe")
    router = tiny.model.weights[0]["router"].clone()
    router[:, 1], router[:, 3], router[:, 4:] = -router[:, 0], -router[:, 2], 0.0  # one of each pair is above zero
    tiny = replace(tiny, model=copy(tiny.model))
    tiny.model.weights = [{**tiny.model.weights[0], "router": router}]
    ran = go(tiny, 4)
    wanted = 64  # the larger of hidden size and intermediate size
    for e in range(6):
        moments = of(seen, ran.run, f"experts.{e}.down_proj")
        assert moments.tokens >= wanted
        flags = ran.done[f"experts.{e}.down_proj"].flags
        assert flags == ran.done[f"experts.{e}.up_proj"].flags == ran.done[f"experts.{e}.gate_proj"].flags
        assert bool(flags) == (e >= 4)
        assert e < 4 or flags == ("0 tokens routed, 64 more borrowed from the next best",)
