"""Allocation against every layout there is on small instances, and its promises on those of a real model's shapes."""

import itertools

import numpy as np
import pytest

from convert.allocate import Allocation, allocate, attainable, require_attainable, uniform
from convert.encoded import check_layout, stored_bits
from convert.measure import GROUP_SIZES, Sensitivity
from exl_runtime.errors import ConvertError
from exl_runtime.formats.exl2 import WIDTHS

Front = list[tuple[int, float]]  # (bits, least loss), both strictly ordered


def matrix(path: str, inputs: int, outputs: int, seed: int, *, weight: float = 1.0, noise: float = 0.1) -> Sensitivity:
    """Losses as they are measured: falling over the blocks but for noise, a quarter per bit, more in larger groups."""
    pick = np.random.default_rng(seed)
    blocks = inputs // 32
    rough = np.sort(np.exp(pick.normal(0, 1, blocks)))[::-1] * np.exp(pick.normal(0, noise, blocks)) * weight
    losses = {
        (bits, size): tuple(
            (rough * 4.0**-bits * (1 + 0.08 * np.log2(size / 32) + 0.02 * pick.normal(size=blocks))).tolist()
        )
        for bits, sizes in GROUP_SIZES.items()
        for size in sizes
    }
    return Sensitivity(path=path, inputs=inputs, outputs=outputs, biased=seed % 3 == 0, losses=losses)


def limits_of(items: list[Sensitivity]):
    return attainable([(item.inputs, item.outputs, item.biased) for item in items])


def weights_of(items: list[Sensitivity]) -> int:
    return sum(item.inputs * item.outputs for item in items)


def loss_of(item: Sensitivity, layout: tuple[tuple[int, int], ...]) -> float:
    """The sum over blocks of what was measured for the group size that cuts the width's rows like this."""
    lost, block = 0.0, 0
    for bits, runs in itertools.groupby(layout, key=lambda group: group[0]):
        rows = [count for _, count in runs]
        blocks = range(block, block + sum(rows) // 32)
        same = tuple((bits, count) for count in rows)
        size = min(size for size in GROUP_SIZES[bits] if uniform(sum(rows), bits, size) == same)
        lost += sum(item.losses[bits, size][b] for b in blocks)
        block = blocks.stop
    return lost


def thinned(points: Front) -> Front:
    kept: Front = []
    for bits, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((bits, loss))
    return kept


def every_layout(item: Sensitivity) -> Front:
    """All sequences of widths that never rise, times all group sizes of each width."""
    points = {}
    blocks = item.inputs // 32
    for widths in itertools.combinations_with_replacement(WIDTHS, blocks):
        used = sorted(set(widths), reverse=True)
        for sizes in itertools.product(*(GROUP_SIZES[bits] for bits in used)):
            chosen = dict(zip(used, sizes, strict=True))
            layout = sum((uniform(32 * widths.count(bits), bits, chosen[bits]) for bits in used), ())
            lost = loss_of(item, layout)
            bits = stored_bits(layout, item.inputs, item.outputs, biased=item.biased)
            points[bits] = min(lost, points.get(bits, np.inf))
    return thinned(list(points.items()))


def best_of_all(items: list[Sensitivity]) -> Front:
    front: Front = [(0, 0.0)]
    for item in items:
        front = thinned([(a + b, x + y) for a, x in front for b, y in every_layout(item)])
    return front


def optimum(front: Front, budget: int) -> float:
    return min(loss for bits, loss in front if bits <= budget)


def require_consistent(found: Allocation, items: list[Sensitivity]) -> None:
    """What an allocation says of itself is true of its layouts."""
    assert found.layouts.keys() == {item.path for item in items}
    bits = 0
    for item in items:
        layout = found.layouts[item.path]
        check_layout(layout, item.inputs)  # widths never rise, whole blocks, all rows
        assert all(rows <= 128 for _, rows in layout)
        bits += stored_bits(layout, item.inputs, item.outputs, biased=item.biased)
    assert found.bits == bits and found.weights == weights_of(items)
    assert found.bits_per_weight == bits / found.weights


SMALL = [
    [matrix("a", 96, 64, 1), matrix("b", 64, 160, 2, weight=5)],
    [matrix("a", 96, 96, 3), matrix("b", 96, 64, 4, weight=0.2), matrix("c", 64, 64, 5)],
    [matrix("a", 64, 32, 6), matrix("b", 96, 128, 7, weight=20), matrix("c", 64, 96, 8, weight=0.01)],
]


@pytest.mark.parametrize("items", SMALL, ids=["two", "three", "uneven"])
def test_close_to_the_best_of_all_layouts(items: list[Sensitivity]) -> None:
    front, limits = best_of_all(items), limits_of(items)
    ratios = []
    for target in np.linspace(limits.lowest, limits.highest, 30):
        found = allocate(items, target)
        require_consistent(found, items)
        assert found.bits_per_weight <= target
        budget = int(target * found.weights + 1e-6)
        best = optimum(front, budget)
        measured = sum(loss_of(item, found.layouts[item.path]) for item in items)
        assert found.loss == pytest.approx(measured)
        assert found.loss >= best * (1 - 1e-9)
        ratios.append(found.loss / best)
    # a single block is a large part of so small a model; what a price leaves of the budget is spent greedily
    assert np.mean(ratios) < 1.1 and np.max(ratios) < 1.5
    assert np.mean(np.array(ratios) < 1 + 1e-9) > 0.1


def convex(front: Front) -> Front:
    """The points that are best at some price of a bit."""
    hull: Front = []
    for point in front:
        while len(hull) >= 2 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-1][0]) >= (point[1] - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(point)
    return hull


def test_exact_where_the_budget_hits_a_price() -> None:
    """Matrices of one block, where overheads are no fractions: at every price the sum is the least there is."""
    items = [matrix(f"m{i}", 32, 32 * (1 + i % 3), 10 + i, weight=3.0 ** (i % 4)) for i in range(6)]
    hull = convex(best_of_all(items))
    assert len(hull) > 15
    for bits, loss in hull:
        target = min((bits + 0.5) / weights_of(items), limits_of(items).highest)
        found = allocate(items, target)
        assert found.loss == pytest.approx(loss, rel=1e-9) and found.bits <= bits


# --- a real model's shapes ---------------------------------------------------------------------------------------


def model(seed: int, layers: int = 3) -> list[Sensitivity]:
    """Matrices of 256 and 768 rows, some a hundred times as delicate as others."""
    shapes = {"q": (256, 256), "k": (256, 128), "v": (256, 128), "o": (256, 256)}
    shapes |= {"gate": (256, 768), "up": (256, 768), "down": (768, 256)}
    pick = np.random.default_rng(seed)
    return [
        matrix(f"{i}.{name}", *shape, int(pick.integers(10**6)), weight=float(np.exp(pick.normal(0, 1.5))), noise=0.3)
        for i in range(layers)
        for name, shape in shapes.items()
    ]


def test_just_below_the_target_and_better_with_every_bit() -> None:
    items = model(0)
    limits = limits_of(items)
    losses = []
    for target in np.linspace(limits.lowest, limits.highest, 17):
        found = allocate(items, target)
        require_consistent(found, items)
        assert 0 <= target - found.bits_per_weight < 0.01
        losses.append(found.loss)
    assert all(after < before for before, after in itertools.pairwise(losses))


def test_better_than_one_width_for_all() -> None:
    items = model(1)
    for bits in (3, 4, 5, 6):
        size = GROUP_SIZES[bits][0]
        even = sum(stored_bits(uniform(i.inputs, bits, size), i.inputs, i.outputs, biased=i.biased) for i in items)
        found = allocate(items, even / weights_of(items) + 1e-9)
        assert found.loss < 0.7 * sum(sum(item.losses[bits, size]) for item in items)


def test_delicate_matrices_and_rows_get_the_bits() -> None:
    """By hand: two matrices, one a million times as delicate; and one whose first block is."""
    flat = {place: (4.0 ** -place[0],) * 4 for place in ((b, s) for b, sizes in GROUP_SIZES.items() for s in sizes)}

    def made(path: str, factors: tuple[float, ...]) -> Sensitivity:
        losses = {place: tuple(x * f for x, f in zip(row, factors, strict=True)) for place, row in flat.items()}
        return Sensitivity(path=path, inputs=128, outputs=128, biased=False, losses=losses)

    found = allocate([made("a", (1e6,) * 4), made("b", (1.0,) * 4)], 5.4)
    assert found.layouts["a"] == ((8, 128),) and found.layouts["b"][0][0] <= 3
    found = allocate([made("a", (1e4, 1.0, 1.0, 1.0))], 4.5)
    assert found.layouts["a"][0] == (8, 32) and all(bits <= 3 for bits, _ in found.layouts["a"][1:])


@pytest.mark.parametrize("target", [3.0, 4.5])
def test_matrices_without_losses(target: float) -> None:
    """Experts that nobody visited cost nothing at any width: they take the least, the others what is left."""
    items = model(2, layers=1)
    dead = [
        Sensitivity(
            path=f"dead.{i}", inputs=256, outputs=128, biased=False, losses=dict.fromkeys(items[0].losses, (0.0,) * 8)
        )
        for i in range(2)
    ]
    found = allocate([*items, *dead], target)
    require_consistent(found, [*items, *dead])
    assert found.bits_per_weight <= target
    assert all(found.layouts[item.path] == ((2, 128), (2, 128)) for item in dead)
    nothing = allocate(dead, 2.5)
    assert nothing.loss == 0 and nothing.bits_per_weight <= 2.5


def test_the_same_every_time_and_at_any_scale() -> None:
    """Only the proportions of losses count, over a wide range."""
    items = model(3, layers=2)
    found = allocate(items, 3.7)
    for factor in (1.0, 2.0**-40, 2.0**20):
        scaled = [
            Sensitivity(
                path=item.path,
                inputs=item.inputs,
                outputs=item.outputs,
                biased=item.biased,
                losses={place: tuple(factor * x for x in row) for place, row in item.losses.items()},
            )
            for item in items
        ]
        assert allocate(scaled, 3.7).layouts == found.layouts


# --- what can be reached -----------------------------------------------------------------------------------------


def test_the_range_is_that_of_the_extremes() -> None:
    """By hand: 128 x 64 at 2 and at 8 bits in one group, with permutation, scales and, once, a bias."""
    limits = attainable([(128, 64, False)])
    overhead = 16 + 32 + 4 * 64 + 32 * 128
    assert limits.lowest == 2 + overhead / 8192 and limits.highest == 8 + overhead / 8192
    assert attainable([(128, 64, True)]).lowest == limits.lowest + 16 * 64 / 8192
    both = attainable([(128, 64, False), (128, 128, False)])
    assert limits.lowest > both.lowest > attainable([(128, 128, False)]).lowest


def test_both_ends_can_be_had() -> None:
    items = model(4, layers=1)
    limits = limits_of(items)
    least, most = allocate(items, limits.lowest), allocate(items, limits.highest)
    assert all(bits == 2 for layout in least.layouts.values() for bits, _ in layout)
    assert all(bits == 8 for layout in most.layouts.values() for bits, _ in layout)
    assert least.bits_per_weight == limits.lowest and most.bits_per_weight == limits.highest
    for target in (limits.lowest, limits.highest):
        require_attainable(target, limits)


@pytest.mark.parametrize("target", [0.5, 2.0, 8.5, 16.0, float("nan")])
def test_the_range_is_named_when_it_is_missed(target: float) -> None:
    items = model(5, layers=1)
    limits = limits_of(items)
    with pytest.raises(ConvertError) as caught:
        allocate(items, target)
    assert f"{target:g} bits per weight" in str(caught.value)
    assert f"{limits.lowest:.3f} to {limits.highest:.3f}" in str(caught.value)
    if target == target:  # what the hint says can be had
        require_attainable(float(str(caught.value).split("use -b ")[1].split(",")[0]), limits)
