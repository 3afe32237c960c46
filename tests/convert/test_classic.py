"""The baseline: errors of exllamav2's options measured on tiny layers, and the choice against every choice there is."""

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_layers import TinyModel, ids_of, open_tiny
from torch import Tensor

from convert import classic as module
from convert.classic import Rows, choose, measure_layer
from convert.encoded import stored_bits
from convert.encoder import CLASSIC, encode
from convert.layouts import CLASSIC_ATTENTION, CLASSIC_MLP
from convert.moments import factor
from exl_runtime.errors import ConvertError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def half(index: int, table: str, errors: tuple[float, ...], hidden: int, inner: int) -> Rows:
    shapes = {**dict.fromkeys(ATTENTION, (hidden, hidden)), **dict.fromkeys(MLP, (hidden, inner))}
    shapes["down_proj"] = (inner, hidden)
    parts = ATTENTION if table == "attention" else MLP
    slots = tuple((f"layers.{index}.{part}", *shapes[part], index == 1) for part in parts)
    return Rows(name=f"{index}.{table}", table=table, slots=slots, errors=errors)


def model(layers: int, seed: int, *, hidden: int = 4096, inner: int = 11008, noise: float = 0.1) -> list[Rows]:
    """Errors that halve with every bit, but for noise and for how delicate a layer is."""
    pick = np.random.default_rng(seed)
    made = []
    for index in range(layers):
        delicate = float(np.exp(pick.normal(0, 0.7)))
        for table, count in (("attention", 19), ("mlp", 17)):
            blank = half(index, table, (1.0,) * count, hidden, inner)
            weights = sum(k * n for _, k, n, _ in blank.slots)
            errors = [
                delicate * 2.0 ** (-bits / weights) * float(np.exp(pick.normal(0, noise))) for bits in blank.sizes()
            ]
            made.append(half(index, table, tuple(errors), hidden, inner))
    return made


def weights_of(halves: list[Rows]) -> int:
    return sum(k * n for one in halves for _, k, n, _ in one.slots)


def rows_of(halves: list[Rows], layouts: dict) -> list[int]:
    """The row of every half's table whose layouts were chosen."""
    found = []
    for one in halves:
        mine = {path: layouts[path] for path, *_ in one.slots}
        found.append(next(row for row in range(len(one.options)) if one.layouts(row) == mine))
    assert layouts.keys() == {path for one in halves for path, *_ in one.slots}
    return found


def bits_of(halves: list[Rows], layouts: dict) -> int:
    return sum(stored_bits(layouts[p], k, n, biased=b) for one in halves for p, k, n, b in one.slots)


# --- the choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [2.3, 4.1, 9.0])
def test_within_the_budget_and_well_used(target: float) -> None:
    halves = model(2, seed=1)
    chosen = choose(halves, target)
    rows, bits = rows_of(halves, chosen), bits_of(halves, chosen)
    assert bits <= target * weights_of(halves)
    for one, row in zip(halves, rows, strict=True):  # no next entry would fit
        sizes = one.sizes()
        assert row + 1 == len(sizes) or bits - sizes[row] + sizes[row + 1] > target * weights_of(halves)
    if target == 9.0:
        assert rows == [18, 16] * 2


def exact(costs: list[list[float]], sizes: list[list[int]]) -> list[tuple[int, float]]:
    """(bits, least cost) of all combinations of rows, without those that others beat in both."""
    front = [(0, 0.0)]
    for cost, size in zip(costs, sizes, strict=True):
        merged = sorted((a + b, x + y) for a, x in front for b, y in zip(size, cost, strict=True))
        front = []
        for point in merged:
            if not front or point[1] < front[-1][1]:
                front.append(point)
    return front


@pytest.mark.parametrize(("layers", "hidden", "inner"), [(1, 128, 352), (2, 256, 768), (2, 4096, 11008)])
@pytest.mark.parametrize("p", [1.5, 3.5])
def test_the_sum_of_errors_is_the_least_there_is(
    layers: int, hidden: int, inner: int, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the next entries are bought, which may raise it. To one part in 16384 of the budget for each half."""
    monkeypatch.setattr(module, "_raise", lambda rows, sizes, budget: rows)
    halves = model(layers, seed=layers, hidden=hidden, inner=inner)
    sizes = [one.sizes() for one in halves]
    costs = [[error**p for error in one.errors] for one in halves]
    front = exact(costs, sizes)
    ratios = []
    for budget in np.linspace(front[0][0], front[-1][0], 23).astype(int).tolist():
        rows = module._solve(halves, sizes, budget, p)
        assert sum(size[row] for size, row in zip(sizes, rows, strict=True)) <= budget
        best = min(cost for bits, cost in front if bits <= budget)
        ratios.append(sum(cost[row] for cost, row in zip(costs, rows, strict=True)) / best)
    assert min(ratios) >= 1 - 1e-9 and max(ratios) < 1.05
    assert np.mean(np.array(ratios) < 1 + 1e-9) > 0.85


def test_coarse_sums_never_overspend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are rounded up: even where a unit is a good part of what there is to spend."""
    monkeypatch.setattr(module, "LEAST_CELLS", 16)
    monkeypatch.setattr(module, "CELLS", 4)
    halves = model(3, seed=8, hidden=256, inner=768)
    sizes = [one.sizes() for one in halves]
    costs = [list(one.errors) for one in halves]
    spent = []
    for budget in np.linspace(sum(map(min, sizes)), sum(map(max, sizes)), 60).astype(int).tolist():
        rows = module._knapsack(costs, sizes, budget)
        spent.append(sum(size[row] for size, row in zip(sizes, rows, strict=True)) / budget)
    assert max(spent) <= 1 and np.mean(spent) > 0.93


def test_no_random_search_finds_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annealing over single moves, as exllamav2 does it; twelve halves, of the sizes of a small model."""
    monkeypatch.setattr(module, "_raise", lambda rows, sizes, budget: rows)
    halves = model(6, seed=4, hidden=256, inner=768)
    sizes = np.array([one.sizes() + [10**12] * (19 - len(one.errors)) for one in halves])
    costs = np.array([[e**2.0 for e in one.errors] + [1e9] * (19 - len(one.errors)) for one in halves])
    budget = int(3.5 * weights_of(halves))
    ours = module._solve(halves, [one.sizes() for one in halves], budget, 2.0)
    place = np.arange(12)
    least = costs[place, ours].sum()
    pick = np.random.default_rng(0)
    for _ in range(3):
        rows = np.zeros(12, int)
        spent, cost, heat = sizes[place, rows].sum(), costs[place, rows].sum(), 1e-2
        for i, row, luck in zip(
            pick.integers(12, size=6000), pick.integers(19, size=6000), pick.random(6000), strict=True
        ):
            heat *= 0.9985
            more, gain = sizes[i, row] - sizes[i, rows[i]], costs[i, rows[i]] - costs[i, row]
            if spent + more <= budget and (gain > 0 or luck < np.exp(gain / heat)):
                rows[i], spent, cost = row, spent + more, cost - gain
        assert least <= cost * (1 + 1e-9)


def test_the_rest_buys_next_entries() -> None:
    """Whether they help or not: here nothing after the first row lowers the error."""
    halves = [half(0, "attention", (0.1, *(0.2,) * 18), 4096, 11008), half(0, "mlp", (0.1, *(0.2,) * 16), 4096, 11008)]
    rows = rows_of(halves, choose(halves, 4.1))
    assert min(rows) > 0
    assert module._raise([0, 0], [[10, 12, 11, 30], [10, 15]], 27) == [2, 1]  # first 0 -> 1, then 1 -> 1, then 1 -> 2
    assert module._raise([0, 0], [[10, 12, 11, 30], [10, 15]], 22) == [2, 0]
    assert module._raise([0, 0], [[10, 12], [10, 15]], 20) == [0, 0]
    assert module._raise([0, 0], [[10, 12, 14, 16], [10, 12, 14]], 24) == [1, 1]


def test_p_is_the_one_with_the_least_worst_error() -> None:
    halves = model(2, seed=7)
    target = 3.7
    chosen = rows_of(halves, choose(halves, target))
    worst = max(one.errors[row] for one, row in zip(halves, chosen, strict=True))
    sizes = [one.sizes() for one in halves]
    for p in (1.5, 2.5, 3.5):
        rows = module._solve(halves, sizes, int(target * weights_of(halves)), p)
        assert worst <= max(one.errors[row] for one, row in zip(halves, rows, strict=True))


def test_delicate_halves_get_more_and_the_choice_is_the_same_every_time() -> None:
    halves = model(3, seed=2, noise=0.0)
    chosen = choose(halves, 4.0)
    assert choose(halves, 4.0) == chosen
    rows = rows_of(halves, chosen)
    by_need = sorted(range(0, 6, 2), key=lambda i: halves[i].errors[0])
    assert all(rows[a] <= rows[b] for a, b in pairwise(by_need)) and rows[by_need[0]] < rows[by_need[-1]]


@pytest.mark.parametrize("target", [0.5, 2.0, float("nan")])
def test_too_few_bits_are_refused_with_the_range(target: float) -> None:
    halves = model(1, seed=3)
    least = sum(min(one.sizes()) for one in halves) / weights_of(halves)
    most = sum(max(one.sizes()) for one in halves) / weights_of(halves)
    with pytest.raises(ConvertError, match=f"{target:g} bits per weight.*{least:.3f} to {most:.3f}"):
        choose(halves, target)
    assert rows_of(halves, choose(halves, least + 1e-6)) == [0, 0]


# --- half layers and their file ----------------------------------------------------------------------------------


def test_sizes_are_stored_bits() -> None:
    one = half(1, "mlp", (0.1,) * 17, 256, 768)
    assert one.options == CLASSIC_MLP and half(0, "attention", (0.1,) * 19, 256, 768).options == CLASSIC_ATTENTION
    for row, size in enumerate(one.sizes()):
        layouts = one.layouts(row)
        assert layouts == {
            f"layers.1.{key}": option.layout(768 if key == "down_proj" else 256)
            for key, option in CLASSIC_MLP[row].items()
        }
        assert size == bits_of([one], layouts)


def test_experts_spelled_with_letters() -> None:
    slots = tuple(
        (f"experts.2.{name}", *shape, False) for name, shape in (("w1", (64, 96)), ("w3", (64, 96)), ("w2", (96, 64)))
    )
    one = Rows(name="x", table="mlp", slots=slots, errors=(0.1,) * 17)
    row = CLASSIC_MLP[1]
    assert one.layouts(1) == {
        "experts.2.w1": row["gate_proj"].layout(64),
        "experts.2.w3": row["up_proj"].layout(64),
        "experts.2.w2": row["down_proj"].layout(96),
    }


def test_measurements_survive_the_file() -> None:
    for one in model(2, seed=5):
        assert Rows.from_json(one.name, json.loads(json.dumps(one.to_json())), "measurement.json") == one


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("table", "mlpp"),
        ("table", None),
        ("slots", []),
        ("slots", None),
        ("slots", [["layers.0.q_proj", 64]]),
        ("slots", [["layers.0.gate_proj", 64, 64, False]]),
        ("slots", [["layers.0.q_proj", 100, 64, False]]),
        ("slots", [["layers.0.q_proj", 0, 64, False]]),
        ("slots", [["layers.0.q_proj", 64, 0, False]]),
        ("slots", [["layers.0.q_proj", float("inf"), 64, False]]),
        ("errors", [0.1] * 18),
        ("errors", None),
        ("errors", ["x"] * 19),
        ("errors", [float("nan")] * 19),
        ("errors", [float("inf")] * 19),
        ("errors", [-0.1] * 19),
    ],
    ids=str,
)
def test_damaged_measurements(key: str, value: object) -> None:
    entry = half(0, "attention", (0.1,) * 19, 64, 96).to_json()
    for damaged in ({**entry, key: value}, {name: entry[name] for name in entry if name != key}):
        with pytest.raises(ConvertError, match=r"measurement\.json: the entry of 0\.attention"):
            Rows.from_json("0.attention", damaged, "measurement.json")


@pytest.mark.parametrize("entry", [None, 3, [], "text"])
def test_entries_that_are_none(entry: object) -> None:
    with pytest.raises(ConvertError, match="damaged"):
        Rows.from_json("x", entry, "measurement.json")


# --- measuring ---------------------------------------------------------------------------------------------------

ROWS, LENGTH = 8, 40


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    root = tmp_path_factory.mktemp("classic")
    return cache(lambda name: open_tiny(name, root, LENGTH))


def hessian_of(inputs: Tensor) -> Tensor:
    flat = inputs.flatten(0, -2).double()
    return (flat.t() @ flat / flat.shape[0]).float()


@pytest.mark.parametrize("name", ["llama_bias", "gemma2"])
@torch.no_grad()
def test_errors_of_a_dense_layer(name: str, opened) -> None:
    """Three rows of each table by other means: one H per input, one changed half, norms of whole rows."""
    forward, weights, slots = opened(name).layer(1)
    x = opened(name).before(1, ids_of(ROWS, LENGTH))
    notes: list[str] = []
    attention, mlp, outputs = measure_layer(forward, slots, weights, x, chunk=3, advance=notes.append)
    assert notes == ["attention of layer 1", "MLP of layer 1"]
    assert (attention.name, mlp.name) == ("1.attention", "1.mlp")
    assert [slot[0] for slot in attention.slots] == [slots[key].path for key in ATTENTION]
    for key, (_, *shape) in zip(MLP, mlp.slots, strict=True):
        assert shape == [slots[key].inputs, slots[key].outputs, slots[key].biased]
    torch.testing.assert_close(outputs, forward(x, weights), rtol=1e-5, atol=1e-5)

    h = forward.attention_input(x, weights)
    middle = forward.attention_add(x, forward.attention_inner(h, weights), weights)
    m = forward.mlp_input(middle, weights)
    inputs = {
        **dict.fromkeys(ATTENTION[:3], h),
        "o_proj": forward.attention_inner(h, weights),
        **dict.fromkeys(MLP[:2], m),
        "down_proj": forward.mlp_inner(m, weights),
    }
    factors = {key: factor(hessian_of(t), damping=CLASSIC.damping, floor=CLASSIC.floor) for key, t in inputs.items()}
    for found, table, before in ((attention, CLASSIC_ATTENTION, x), (mlp, CLASSIC_MLP, middle)):
        assert len(found.errors) == len(table)
        for row in (0, 5, len(table) - 1):
            changed = dict(weights)
            for key, option in table[row].items():
                changed[key] = encode(weights[key], factors[key], option.layout(slots[key].inputs), CLASSIC).weight()
            if found is attention:
                inner = forward.attention_inner(forward.attention_input(before, changed), changed)
                got, wanted = forward.attention_add(before, inner, changed), middle
            else:
                got, wanted = forward.mlp(before, changed), forward.mlp(before, weights)
            ratios = [float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True)]
            # sums of other pieces move a few codes
            assert found.errors[row] == pytest.approx(np.mean(ratios), rel=0.02), row
        assert found.errors[0] > found.errors[7] > 5 * found.errors[-1] > 0


def test_errors_of_experts(opened) -> None:
    forward, weights, slots = opened("mixtral").layer(0)
    x = opened("mixtral").before(0, ids_of(ROWS, LENGTH))
    attention, mlp, outputs = measure_layer(forward, slots, weights, x, chunk=3, advance=lambda note: None)
    assert [slot[0] for slot in mlp.slots] == [slots[key].path for key in slots if key.startswith("experts.")]
    assert len(mlp.slots) == 12 and len(attention.slots) == 4
    with torch.no_grad():
        torch.testing.assert_close(outputs, forward(x, weights), rtol=1e-5, atol=1e-5)
        inner = forward.attention_inner(forward.attention_input(x, weights), weights)
        middle = forward.attention_add(x, inner, weights)
        m = forward.mlp_input(middle, weights)
        _, chosen, _ = forward.route(m, weights)
        changed = dict(weights)
        for e in range(4):  # all see more tokens than they are wide: none are borrowed
            seen = m.flatten(0, 1)[(chosen == e).any(dim=1)]
            for part, option in CLASSIC_MLP[0].items():
                key = f"experts.{e}.{part}"
                inputs = forward.expert_inner(seen, weights, e) if part == "down_proj" else seen
                factors = factor(hessian_of(inputs), damping=CLASSIC.damping, floor=CLASSIC.floor)
                changed[key] = encode(weights[key], factors, option.layout(slots[key].inputs), CLASSIC).weight()
        ratios = [
            float((got - y).norm() / y.norm()) for got, y in zip(forward.mlp(middle, changed), outputs, strict=True)
        ]
    assert mlp.errors[0] == pytest.approx(np.mean(ratios), rel=0.01)
    assert 1 > mlp.errors[0] > 2 * mlp.errors[7] > 10 * mlp.errors[-1] > 0
    chosen = choose([attention, mlp], 4.5)
    assert chosen.keys() == {slot.path for slot in slots.values()}
    experts = [layout for path, layout in chosen.items() if path.endswith(".w1")]
    assert len(set(experts)) == 1 and len(experts) == 4  # all share one choice
