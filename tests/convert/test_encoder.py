"""The encoder against AdaptiveGPTQ written slowly from formats/exl2.md 6.2-6.4, and against the loss it lowers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import same_bits

from convert import encoder as module
from convert.encoded import Encoded, Layout
from convert.encoder import BEST, CLASSIC, QUICK, Recipe, attempt, encode
from convert.layouts import HEAD, option
from convert.moments import Factor, factor
from exl_runtime.formats import Exl2, LinearShape

LAYOUTS: dict[str, Layout] = {
    "4/3 .1 64": option("4/3", ".1", "64").layout(192),
    "6/3/2": option("6/3/2", ".05/.2", "32/64/64").layout(352),
    "8/6 head": HEAD[6].layout(192),
    "every width": ((8, 32), (6, 32), (5, 64), (4, 32), (3, 32), (2, 64)),
    "one block": ((4, 32),),
    "short last group": ((3, 64), (3, 64), (3, 32)),
    **{f"{bits} bits": ((bits, 64), (bits, 32)) for bits in (2, 3, 4, 5, 6, 8)},
}


def problem(inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (K, N) and the H of inputs with common directions and channels of different size."""
    pick = np.random.default_rng(seed)
    x = pick.normal(size=(3 * inputs, inputs)) + 2 * pick.normal(size=(3 * inputs, 4)) @ pick.normal(size=(4, inputs))
    x *= np.exp(0.7 * pick.normal(size=inputs))
    weight = 0.02 * pick.standard_t(6, size=(inputs, outputs)) * np.exp(0.2 * pick.normal(size=outputs))
    return torch.from_numpy(weight).float(), torch.from_numpy(x.T @ x / len(x)).float()


def loss(weight: torch.Tensor, q: torch.Tensor, h: torch.Tensor, damping: float = 0.0) -> float:
    """tr((W - Q)^T (H + damping mean) (W - Q)) in float64."""
    off = (weight.double() - q.double()).numpy()
    wide = h.double().numpy()
    return float(np.sum(off * (wide @ off))) + damping * float(np.mean(np.diag(wide))) * float(np.sum(off**2))


def encoded(weight: torch.Tensor, h: torch.Tensor, layout: Layout, recipe: Recipe) -> Encoded:
    return encode(weight, factor(h, damping=recipe.damping, floor=recipe.floor), layout, recipe)


# --- classic -----------------------------------------------------------------------------------------------------


def slow_scales(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.float16]:
    """6.3 of float32 weights: S as stored and read back, scale codes, the maximum."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    base = ((np.abs(w).max(0) + np.float32(1e-12)) / np.float32((2**bits - 1) / 2)).astype(np.float32)
    m = base.max()
    codes = np.clip(np.rint(16 * np.sqrt(base / m)), 1, 16).astype(np.float32)
    t = (codes / np.float32(16)) ** 2 * m
    best, chosen = np.inf, np.float32(0)
    for i in range(97):
        p = np.float32(0.70 * (1 - i / 96) + 1.2 * (i / 96))
        step = t * p
        off = np.abs(np.clip(np.rint(w / step), low, high) * step - w).astype(np.float64)
        error = np.sum(off**3.5)
        if error < best:
            best, chosen = error, p
    maximum = np.float16(m * chosen)
    unit = np.float16(np.float32(maximum) / np.float32(256))
    return ((codes * codes).astype(np.float16) * unit).astype(np.float32), codes, maximum


def adaptive_gptq(weight: torch.Tensor, h: torch.Tensor, layout: Layout) -> dict[str, np.ndarray]:
    """6.2 and 6.4, row by row; float64 but for scales and for the division by them."""
    w, h = weight.double().numpy(), h.double().numpy()
    perm = np.argsort(-np.diag(h), kind="stable")
    w, h = w[perm].copy(), h[perm][:, perm]
    h += max(0.12 * np.mean(np.diag(h)), 1e-5) * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, scale_codes, maxima, start = np.zeros(w.shape, int), [], [], 0
    for bits, rows in layout:
        stop = start + rows
        scale, nibbles, maximum = slow_scales(w[start:stop].astype(np.float32), bits)
        errors = np.zeros((rows, w.shape[1]))
        for r in range(start, stop):
            code = np.clip(np.rint(w[r].astype(np.float32) / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            q = (code.astype(np.float16) * scale.astype(np.float16)).astype(np.float64)
            errors[r - start] = (w[r] - q) / u[r, r]
            w[r:stop] -= np.outer(u[r, r:stop], errors[r - start])
            codes[r] = code
        w[stop:] -= u[start:stop, stop:].T @ errors
        scale_codes.append(nibbles)
        maxima.append(maximum)
        start = stop
    return {"codes": codes, "scale_codes": np.array(scale_codes), "scale_max": np.array(maxima), "perm": perm}


@pytest.mark.parametrize("outputs", [48, 1, 33])
@pytest.mark.parametrize("name", LAYOUTS)
def test_classic_is_adaptive_gptq(name: str, outputs: int) -> None:
    """Equal but for values so close to half a step that float32 decides; from there a column goes its own way."""
    layout = LAYOUTS[name]
    weight, h = problem(sum(rows for _, rows in layout), outputs, seed=outputs)
    ours, slow = encoded(weight, h, layout, CLASSIC), adaptive_gptq(weight, h, layout)
    assert np.array_equal(ours.perm.numpy(), slow["perm"])
    assert np.array_equal(ours.scale_codes.numpy(), slow["scale_codes"])
    assert np.array_equal(ours.scale_max.numpy(), slow["scale_max"])
    equal = ours.codes.numpy() == slow["codes"]
    assert equal.mean() >= 0.995
    columns = equal.all(axis=0)
    first = np.argmin(equal, axis=0)[~columns]  # where a column departs, it is by one step
    assert (np.abs(ours.codes.numpy() - slow["codes"])[first, ~columns] == 1).all()


def test_classic_is_exact_where_nothing_is_close() -> None:
    """Weights on the grid of their own scale, and an H without correlations: no code is near a tie."""
    pick = np.random.default_rng(4)
    weight = torch.from_numpy(pick.integers(-7, 8, size=(96, 24)) / 64.0).float()
    weight[::32] = 7 / 64
    h = torch.diag(torch.linspace(3, 1, 96))
    layout = ((4, 64), (4, 32))
    ours, slow = encoded(weight, h, layout, CLASSIC), adaptive_gptq(weight, h, layout)
    assert np.array_equal(ours.codes.numpy(), slow["codes"])
    assert same_bits(ours.weight(), weight) or loss(weight, ours.weight(), h) <= 1e-4 * loss(weight, 0 * weight, h)


def test_damping_of_a_tiny_hessian_has_a_floor() -> None:
    """1e-5 added to a H of 1e-9 leaves nothing of its correlations: the codes are those of an identity."""
    weight, h = problem(64, 20)
    layout = ((3, 64),)
    tiny = encoded(weight, h * (1e-9 / float(h.diagonal().mean())), layout, CLASSIC)
    plain = encode(weight, Factor(tiny.perm, torch.eye(64), torch.eye(64), 0.0), layout, CLASSIC)
    assert torch.equal(tiny.codes, plain.codes)
    assert not torch.equal(encoded(weight, h, layout, CLASSIC).codes, plain.codes)


# --- what is true of every encoding ------------------------------------------------------------------------------

RECIPES = {"classic": CLASSIC, "quick": QUICK, "best": BEST}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_encodings_are_legal_and_read_back_the_same(name: str, recipe: str) -> None:
    layout = LAYOUTS[name]
    inputs = sum(rows for _, rows in layout)
    weight, h = problem(inputs, 37, seed=5)
    made = encoded(weight, h, layout, RECIPES[recipe])
    start = 0
    for bits, rows in layout:
        codes = made.codes[start : start + rows]
        assert int(codes.min()) >= -(2 ** (bits - 1)) and int(codes.max()) < 2 ** (bits - 1)
        start += rows
    read = Exl2.load(made.tensors(), LinearShape(inputs, 37)).dequantize()
    assert same_bits(read, made.weight())
    diagonal = h.diagonal()[made.perm]
    assert (diagonal[1:] <= diagonal[:-1]).all()
    again = encoded(weight, h, layout, RECIPES[recipe])
    for part in ("codes", "scale_codes", "scale_max", "perm"):
        assert torch.equal(getattr(again, part), getattr(made, part)), part


def test_inputs_are_left_alone() -> None:
    weight, h = problem(96, 16)
    kept, factors = weight.clone(), factor(h, damping=0.05)
    parts = [factors.perm.clone(), factors.h.clone(), factors.u.clone()]
    for recipe in RECIPES.values():
        encode(weight, factors, ((4, 96),), recipe)
    attempt(weight, factors, 4, 32)
    assert torch.equal(weight, kept)
    assert all(torch.equal(a, b) for a, b in zip(parts, (factors.perm, factors.h, factors.u), strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_step_lowers_the_loss(bits: int) -> None:
    """Rounding, feedback, refinement and searched scales alone, and both together."""
    layout = ((bits, 64),) * 3
    losses: dict[str, list[float]] = {}
    for seed in range(3):
        weight, h = problem(192, 40, seed=20 + seed)
        factors = factor(h, damping=0.05)
        rounded = Factor(factors.perm, factors.h, None, float("inf"))
        swept = Recipe(scales="classic", damping=0.05, sweeps=2)
        for name, made in (
            ("rounded", encode(weight, rounded, layout, CLASSIC)),
            ("feedback", encode(weight, factors, layout, CLASSIC)),
            ("refined", encode(weight, factors, layout, swept)),
            ("searched", encode(weight, factors, layout, QUICK)),
            ("best", encode(weight, factors, layout, BEST)),
        ):
            losses.setdefault(name, []).append(loss(weight, made.weight(), h))
    rounded, feedback, refined, searched, best = (np.array(one) for one in losses.values())
    assert (feedback < 0.6 * rounded).all()
    assert (refined < (0.97 if bits < 8 else 1) * feedback).all()
    assert (searched < 0.98 * feedback).all()
    assert (best < 0.998 * searched).all() and (best < refined).all()


@pytest.mark.parametrize("scales", ["classic", "search"])
@pytest.mark.parametrize("name", ["every width", "4/3 .1 64", "8 bits"])
def test_no_sweep_raises_the_loss_it_works_on(name: str, scales: str) -> None:
    layout = LAYOUTS[name]
    weight, h = problem(sum(rows for _, rows in layout), 24, seed=6)
    factors = factor(h, damping=0.05)
    found = [
        loss(weight, encode(weight, factors, layout, recipe).weight(), h, damping=0.05)
        for recipe in (Recipe(scales=scales, damping=0.05, sweeps=n, sweep_damping=0.05) for n in range(4))
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(found))
    assert found[1] < (0.999 if "8" not in name else 1) * found[0]


def test_refinement_keeps_its_books(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that each group starts from is that of the matrix as it is then."""
    held = []

    class Spied(module._State):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            held.append(self)

    def descend(q: torch.Tensor, gradient: torch.Tensor, *given):
        state, (start, stop) = held[0], groups[len(seen) % 3]
        wanted = wide @ (state.wanted.double() - state.q.double())
        assert torch.equal(q, state.q[start:stop])
        assert (gradient - wanted[start:stop]).abs().max() <= 1e-5 * scale
        seen.append(start)
        return original(q, gradient, *given)

    weight, h = problem(96, 12, seed=8)
    groups, seen, original = [(0, 32), (32, 64), (64, 96)], [], module.ops.descend
    factors = factor(h, damping=0.05)
    wide = factors.h.double() + 0.05 * factors.h.double().diagonal().mean() * torch.eye(96)
    scale = float((wide @ weight[factors.perm].double()).abs().max())
    monkeypatch.setattr(module, "_State", Spied)
    monkeypatch.setattr(module.ops, "descend", descend)
    encode(weight, factors, ((3, 32),) * 3, Recipe(scales="classic", damping=0.05, sweeps=3))
    assert seen == [0, 32, 64] * 3


def test_refinement_ends_where_nothing_improves() -> None:
    """More sweeps than anybody needs: at the end no single code and no scale code of a column can be improved."""
    weight, h = problem(64, 12, seed=8)
    layout = ((3, 32), (3, 32))
    recipe = Recipe(scales="search", damping=0.05, sweeps=30)
    made = encoded(weight, h, layout, recipe)
    order = made.perm.numpy()
    wide = h.double().numpy()[order][:, order]
    wide += 0.05 * np.mean(np.diag(wide)) * np.eye(64)
    off = weight.double().numpy()[order] - made.weight().double().numpy()[order]
    scales = made.scales().double().numpy().repeat(32, axis=0)
    for step in (-1, 1):
        inside = np.abs(made.codes.numpy() + step + 0.5) <= 4
        # (off - step S)^T H (off - step S) of one changed entry, relative to what it was
        change = -2 * step * scales * (wide @ off) + scales**2 * np.diag(wide)[:, None]
        assert (change[inside] >= -1e-6 * np.abs(off).max() ** 2 * np.diag(wide).max()).all()


def test_columns_are_independent_once_the_maxima_are_shared() -> None:
    """The group's maximum follows all columns; a column that decides none of them may as well be absent."""
    weight, h = problem(96, 30, seed=9)
    weight[:, 0] *= 4  # the only column that asks for the largest scale
    layout = ((4, 64), (3, 32))
    factors = factor(h, damping=CLASSIC.damping)
    whole = encode(weight, factors, layout, CLASSIC)
    moved = torch.cat([weight[:, :1], weight[:, 1:].flip(1)], dim=1)
    mirrored = encode(moved, factors, layout, CLASSIC)
    assert torch.equal(mirrored.scale_max, whole.scale_max)
    assert torch.equal(mirrored.codes[:, 1:], whole.codes[:, 1:].flip(1))
    # Two halves that share a maximum because both hold the column that sets it, and the same errors to choose p by:
    doubled = encode(torch.cat([weight, weight], dim=1), factors, layout, CLASSIC)
    assert torch.equal(doubled.scale_max, whole.scale_max)
    assert torch.equal(doubled.codes, whole.codes.repeat(1, 2))


# --- where feedback is not possible ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "hessian",
    [
        torch.zeros(96, 96),
        torch.full((96, 96), float("nan")),
        torch.diag(torch.tensor([float("inf")] + [1.0] * 95)),
        torch.full((96, 96), 50.0).fill_diagonal_(1.0),
    ],
    ids=["zero", "NaN", "infinite", "indefinite"],
)
def test_rounding_where_there_is_no_factor(hessian: torch.Tensor, recipe: str) -> None:
    weight, _ = problem(96, 24)
    factors = factor(hessian, damping=RECIPES[recipe].damping)
    assert factors.u is None
    made = encode(weight, factors, ((4, 64), (2, 32)), RECIPES[recipe])
    assert same_bits(Exl2.load(made.tensors(), LinearShape(96, 24)).dequantize(), made.weight())
    # Every code is the nearest to its weight: no other value of the grid is closer.
    scales = made.scales().double().numpy().repeat([64, 32], axis=0)
    stored = weight.double().numpy()[made.perm.numpy()]
    low, high = np.array([-8] * 64 + [-2] * 32)[:, None], np.array([7] * 64 + [1] * 32)[:, None]
    nearest = np.clip(np.rint(stored / scales), low, high)
    assert np.array_equal(made.codes.numpy(), nearest)
    assert np.sum((stored - nearest * scales) ** 2) < 0.2 * np.sum(stored**2)


def test_rounding_looks_at_the_diagonal() -> None:
    """An indefinite H still says which inputs matter: their rows are sorted first, and scales fit them."""
    weight, _ = problem(64, 40, seed=3)
    hessian = torch.full((64, 64), 500.0).fill_diagonal_(1.0)
    hessian[:8, :8] = torch.eye(8) * 100
    seen = factor(hessian, damping=0.01)
    assert seen.u is None and sorted(seen.perm[:8].tolist()) == list(range(8))
    blind = Factor(seen.perm, torch.zeros(64, 64), None, float("inf"))
    lost = [
        float((encode(weight, one, ((2, 64),), BEST).weight() - weight)[:8].square().sum()) for one in (seen, blind)
    ]
    assert lost[0] < 0.8 * lost[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_of_zero(recipe: str) -> None:
    weight, h = problem(96, 24)
    weight[:, ::2] = 0
    weight[:64] = 0
    for factors in (factor(h, damping=0.05), factor(torch.zeros(96, 96), damping=0.05)):
        made = encode(weight, factors, ((3, 64), (3, 32)), RECIPES[recipe])
        assert not made.weight()[:, ::2].any()
        assert same_bits(Exl2.load(made.tensors(), LinearShape(96, 24)).dequantize(), made.weight())
        nothing = encode(torch.zeros_like(weight), factors, ((3, 64), (3, 32)), RECIPES[recipe])
        assert not nothing.weight().any() and not nothing.codes.any()
        nothing.tensors()


@pytest.mark.parametrize("recipe", RECIPES)
def test_dead_inputs(recipe: str) -> None:
    """Rows whose input is always zero come last and are rounded; the others are as good as without them."""
    weight, h = problem(128, 24, seed=2)
    dead = torch.arange(0, 128, 4)
    h[dead] = 0
    h[:, dead] = 0
    made = encoded(weight, h, ((3, 96), (3, 32)), RECIPES[recipe])
    assert made.perm[96:].tolist() == dead.tolist()
    alive = torch.tensor([i for i in range(128) if i % 4])
    # the mean of the diagonal counts the dead rows; the damping of the small problem is scaled to be the same
    small = Recipe(
        scales=RECIPES[recipe].scales,
        damping=RECIPES[recipe].damping * 0.75,
        sweeps=RECIPES[recipe].sweeps,
        sweep_damping=RECIPES[recipe].sweep_damping * 0.75,
    )
    alone = encoded(weight[alive], h[alive][:, alive], ((3, 96),), small)
    assert torch.equal(made.codes[:96], alone.codes)
    off = (made.weight() - weight)[dead]
    assert float(off.square().sum()) < 0.1 * float(weight[dead].square().sum())


# --- trials ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "size"), [(2, 64), (3, 32), (4, 128), (8, 128)])
def test_a_trial_tells_what_its_encoding_costs(bits: int, size: int) -> None:
    """Column by column the squares add up to the damped quadratic form, and the weight is that of `encode`."""
    weight, h = problem(160, 24, seed=7)
    factors = factor(h, damping=QUICK.damping)
    trial = attempt(weight, factors, bits, size)
    layout = tuple((bits, min(size, 160 - start)) for start in range(0, 160, size))
    assert same_bits(trial.weight, encode(weight, factors, layout, QUICK).weight())
    off = (weight.double() - trial.weight.double()).numpy()
    damped = h.double().numpy()
    damped += QUICK.damping * np.mean(np.diag(damped)) * np.eye(160)
    assert trial.rows_lost.shape == (160, 24)
    assert np.allclose(trial.rows_lost.double().sum(0).numpy(), np.sum(off * (damped @ off), axis=0), rtol=1e-3)
