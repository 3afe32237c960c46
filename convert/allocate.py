"""Which width every block of rows gets, so that the sum of measured losses is least within a number of stored bits.

Lagrangian: for one price of a bit, every matrix by itself takes the layout with the least loss + price * bits, by
dynamic programming over its blocks of 32 rows (widths never rise). The price is the same everywhere at the optimum;
it is found on a grid, and what the grid leaves of the budget is spent greedily. Milliseconds for small models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exl_runtime.errors import ConvertError
from exl_runtime.formats.exl2 import ROW_MULTIPLE, WIDTHS

from .encoded import Layout, stored_bits
from .layouts import uniform
from .measure import GROUP_SIZES, Sensitivity

PRICES = 240


@dataclass(frozen=True, slots=True)
class Choice:
    """One layout of one matrix: stored bits (bias included), predicted loss in nats per token."""

    layout: Layout
    bits: int
    loss: float


@dataclass(frozen=True, slots=True)
class Range:
    """Average bits per weight that can be reached, overhead included."""

    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """path -> layout; bits: all that is stored for these matrices; loss: the predicted sum, nats per token."""

    layouts: Mapping[str, Layout]
    bits: int
    weights: int
    loss: float

    @property
    def bits_per_weight(self) -> float:
        """The average."""
        return self.bits / self.weights


def attainable(shapes: Sequence[tuple[int, int, bool]]) -> Range:
    """Least and most bits per weight of matrices (inputs, outputs, biased): all at 2 and all at 8 bits."""
    weights = sum(inputs * outputs for inputs, outputs, _ in shapes)

    def mean(bits: int) -> float:
        total = sum(stored_bits(uniform(k, bits, GROUP_SIZES[bits][0]), k, n, biased=biased) for k, n, biased in shapes)
        return total / weights

    return Range(mean(2), mean(8))


def require_attainable(target: float, limits: Range) -> None:
    """ConvertError with the range unless `target` bits per weight can be reached."""
    if not limits.lowest <= target <= limits.highest:
        raise ConvertError(
            f"{target:g} bits per weight cannot be reached with this model: it can have {limits.lowest:.3f} to "
            f"{limits.highest:.3f} (scales, permutations and padding included)",
            hint=f"use -b {min(max(target, limits.lowest + 0.005), limits.highest - 0.005):.2f}, or another in between",
        )


def allocate(items: Sequence[Sensitivity], target: float) -> Allocation:
    """The best layouts of at most `target` bits per weight. Raises ConvertError when that is below the least."""
    limits = attainable([(item.inputs, item.outputs, item.biased) for item in items])
    require_attainable(target, limits)
    weights = sum(item.inputs * item.outputs for item in items)
    budget = int(target * weights)
    prices = _prices(items)
    paths = [_path(item, prices) for item in items]
    index = next((i for i in range(PRICES) if sum(path[i].bits for path in paths) <= budget), None)
    chosen = [_least(item) for item in items] if index is None else [path[index] for path in paths]
    chosen = _spend(chosen, [list(dict.fromkeys(path)) for path in paths], budget)
    return Allocation(
        layouts={item.path: choice.layout for item, choice in zip(items, chosen, strict=True)},
        bits=sum(choice.bits for choice in chosen),
        weights=weights,
        loss=sum(choice.loss for choice in chosen),
    )


def _prices(items: Sequence[Sensitivity]) -> np.ndarray:
    """Rising prices of a bit, from one at which everything takes the most to one at which it takes the least."""
    worth = []
    for item in items:
        coarse, fine = (np.array(item.losses[bits, GROUP_SIZES[bits][0]]) for bits in (2, 8))
        worth.append((coarse - fine) / (6 * ROW_MULTIPLE * item.outputs))
    every = np.concatenate(worth)
    positive = every[every > 0]
    top = float(positive.max()) if positive.size else 1.0
    low = float(positive.min()) if positive.size else 1e-12
    return np.geomspace(low * 1e-5, top * 1e2, PRICES)


def _path(item: Sensitivity, prices: np.ndarray) -> list[Choice]:
    """The best layout of one matrix at every price."""
    blocks = item.inputs // ROW_MULTIPLE
    sizes = np.empty((len(prices), len(WIDTHS)), dtype=np.int64)
    value = np.empty((len(prices), len(WIDTHS), blocks))
    for place, bits in enumerate(WIDTHS):
        best = None
        for size in GROUP_SIZES[bits]:
            loss = np.array(item.losses[bits, size])
            cost = ROW_MULTIPLE * bits * item.outputs + (48 + 4 * item.outputs) * ROW_MULTIPLE / min(size, item.inputs)
            sums = loss.sum() + prices * cost * blocks
            here = loss[None] + (prices * cost)[:, None]
            if best is None:
                best, value[:, place], sizes[:, place] = sums, here, size
                continue
            better = sums < best
            best = np.minimum(best, sums)
            value[better, place] = here[better]
            sizes[better, place] = size
    widths = _monotone(value)
    made: dict[bytes, Choice] = {}
    path = []
    for price in range(len(prices)):
        key = widths[price].tobytes() + sizes[price].tobytes()
        if key not in made:
            made[key] = _choice(item, widths[price], sizes[price])
        path.append(made[key])
    return path


def _monotone(value: np.ndarray) -> np.ndarray:
    """value (prices, widths, blocks) -> the index of the width of every block, (prices, blocks), never falling."""
    count, widths, blocks = value.shape
    total = np.zeros((count, widths))
    came = np.empty((blocks, count, widths), dtype=np.int8)
    for block in range(blocks):
        best = np.minimum.accumulate(total, axis=1)
        # where the running minimum was reached
        new = np.concatenate([np.ones((count, 1), bool), total[:, 1:] < best[:, :-1]], axis=1)
        came[block] = np.maximum.accumulate(np.where(new, np.arange(widths), 0), axis=1)
        total = best + value[:, :, block]
    out = np.empty((count, blocks), dtype=np.int8)
    at = total.argmin(axis=1)
    rows = np.arange(count)
    for block in range(blocks - 1, -1, -1):
        out[:, block] = at
        at = came[block, rows, at]
    return out


def _choice(item: Sensitivity, widths: np.ndarray, sizes: np.ndarray) -> Choice:
    layout: list[tuple[int, int]] = []
    loss = 0.0
    for place in dict.fromkeys(widths.tolist()):
        bits = WIDTHS[place]
        rows = int((widths == place).sum()) * ROW_MULTIPLE
        size = _size(bits, int(sizes[place]), rows)
        layout += uniform(rows, bits, size)
        loss += float(np.array(item.losses[bits, size])[widths == place].sum())
    made = tuple(layout)
    return Choice(made, stored_bits(made, item.inputs, item.outputs, biased=item.biased), loss)


def _size(bits: int, wanted: int, rows: int) -> int:
    """The least group size that cuts `rows` rows as `wanted` does: what was measured for it fits best."""
    return min(size for size in GROUP_SIZES[bits] if size >= min(wanted, rows))


def _least(item: Sensitivity) -> Choice:
    size = _size(2, GROUP_SIZES[2][0], item.inputs)
    layout = uniform(item.inputs, 2, size)
    bits = stored_bits(layout, item.inputs, item.outputs, biased=item.biased)
    return Choice(layout, bits, float(sum(item.losses[2, size])))


def _spend(chosen: list[Choice], options: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """Buy the upgrade with the most gain per bit until none fits."""
    left = budget - sum(choice.bits for choice in chosen)
    while True:
        best: tuple[float, int, Choice] | None = None
        for place, (now, path) in enumerate(zip(chosen, options, strict=True)):
            for option in path:
                more = option.bits - now.bits
                if 0 < more <= left and option.loss < now.loss:
                    gain = (now.loss - option.loss) / more
                    if best is None or gain > best[0]:
                        best = (gain, place, option)
        if best is None:
            return chosen
        _, place, option = best
        left -= option.bits - chosen[place].bits
        chosen[place] = option
