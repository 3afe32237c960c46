"""exllamav2's way of choosing widths, as the baseline that `best` is measured against (formats/exl2.md 6.1, 6.5, 6.6).

Every half layer takes one row of an option table. A row's error is measured on unquantized inputs, as the relative
change of the half layer's output, residual stream included. Deviation: where exllamav2 anneals at random for a minute,
the same objective, sum of error^p within the budget, is minimised by dynamic programming, the same way every time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exl_runtime.config.names import EXPERT_LETTERS
from exl_runtime.errors import ConvertError
from exl_runtime.formats.exl2 import ROW_MULTIPLE

from .allocate import Range
from .encoded import Layout, stored_bits
from .encoder import CLASSIC, encode
from .forward import LayerForward
from .layerpass import Assignment
from .layouts import CLASSIC_ATTENTION, CLASSIC_MLP, Option
from .moments import Factor, Moments, factor
from .source import Slot

STEPS = 41  # values of p tried in each sweep
CELLS, LEAST_CELLS = 64, 16384  # parts of the budget that choosing looks at: for every half, and in all
TABLES = {"attention": CLASSIC_ATTENTION, "mlp": CLASSIC_MLP}
SWEEPS = ((1.5, 3.5), (-0.075, 0.075))  # of p; the second around the best of the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One half layer.

    table   a key of TABLES;  slots  of its matrices
    errors  relative error of the half layer's output, for every row of the table
    """

    name: str
    table: str
    slots: tuple[tuple[str, int, int, bool], ...]  # path, inputs, outputs, biased
    errors: tuple[float, ...]

    @property
    def options(self) -> Sequence[Mapping[str, Option]]:
        """The rows of its table."""
        return TABLES[self.table]

    def layouts(self, row: int) -> dict[str, Layout]:
        """path -> layout of one row of the table."""
        return {path: self.options[row][_part(path)].layout(inputs) for path, inputs, _, _ in self.slots}

    def sizes(self) -> list[int]:
        """Stored bits of the half layer for every row of the table."""
        return [
            sum(
                stored_bits(layouts[path], inputs, outputs, biased=biased)
                for path, inputs, outputs, biased in self.slots
            )
            for layouts in (self.layouts(row) for row in range(len(self.options)))
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"table": self.table, "slots": [list(slot) for slot in self.slots], "errors": list(self.errors)}

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any], where: str) -> "Rows":
        """Raises ConvertError naming `where` for anything but what `to_json` wrote."""
        try:
            made = cls(
                name=name,
                table=str(entry["table"]),
                slots=tuple((str(p), int(k), int(n), bool(b)) for p, k, n, b in entry["slots"]),
                errors=tuple(float(x) for x in entry["errors"]),
            )
            parts = made.options[0].keys()
        except (KeyError, TypeError, ValueError, OverflowError) as err:
            raise ConvertError(f"{where}: the entry of {name} is damaged", hint="measure again") from err
        complete = bool(made.slots) and len(made.errors) == len(made.options)
        complete &= all(_part(p) in parts and k > 0 and k % ROW_MULTIPLE == 0 and n > 0 for p, k, n, _ in made.slots)
        if not complete or not all(0 <= error < math.inf for error in made.errors):
            raise ConvertError(f"{where}: the entry of {name} is incomplete", hint="measure again")
        return made


_PARTS = {letter: part for part, letter in EXPERT_LETTERS.items()}


def _part(path: str) -> str:
    """The key in the option tables for a tensor path; experts may be spelled with letters."""
    last = path.rpartition(".")[2]
    return _PARTS.get(last, last)


@torch.no_grad()
def measure_layer(
    f: LayerForward,
    slots: Mapping[str, Slot],
    weights: Mapping[str, Tensor],
    x: Tensor,
    *,
    chunk: int,
    advance: Callable[[str], None],
) -> tuple[Rows, Rows, Tensor]:
    """Try both option tables on one layer. x float32 (rows, length, hidden): unquantized inputs of the layer.

    Returns the measured halves (attention, MLP) and the layer's outputs.
    """
    index = f.layer.index
    chunks = x.split(chunk)
    device = x.device
    first, second = Moments(f.spec.hidden_size, device), Moments(slots["o_proj"].inputs, device)
    for part in chunks:
        h = f.attention_input(part, weights)
        first.add(h)
        second.add(f.attention_inner(h, weights))
    shared = _factor(first)
    factors = {"q_proj": shared, "k_proj": shared, "v_proj": shared, "o_proj": _factor(second)}
    tried = _encoded(slots, weights, factors, CLASSIC_ATTENTION)

    def attention(part: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        return f.attention_add(part, f.attention_inner(f.attention_input(part, w), w), w)

    keys = tuple(factors)
    errors, middle = _errors(attention, chunks, weights, keys, CLASSIC_ATTENTION, tried)
    advance(f"attention of layer {index}")
    found = _rows(f"{index}.attention", "attention", keys, slots, errors)

    factors = _mlp_factors(f, slots, weights, middle)
    tried = _encoded(slots, weights, factors, CLASSIC_MLP)
    keys = tuple(factors)
    errors, outputs = _errors(f.mlp, middle, weights, keys, CLASSIC_MLP, tried)
    advance(f"MLP of layer {index}")
    return found, _rows(f"{index}.mlp", "mlp", keys, slots, errors), torch.cat(outputs)


def _rows(name: str, table: str, keys: Sequence[str], slots: Mapping[str, Slot], errors: Sequence[float]) -> Rows:
    shapes = tuple((slots[key].path, slots[key].inputs, slots[key].outputs, slots[key].biased) for key in keys)
    return Rows(name=name, table=table, slots=shapes, errors=tuple(errors))


def _factor(moments: Moments) -> Factor:
    return factor(moments.hessian, damping=CLASSIC.damping, floor=CLASSIC.floor)


def _mlp_factors(
    f: LayerForward, slots: Mapping[str, Slot], weights: Mapping[str, Tensor], chunks: Sequence[Tensor]
) -> dict[str, Factor]:
    device = chunks[0].device
    if not f.is_moe:
        first, second = (Moments(slots[key].inputs, device) for key in ("gate_proj", "down_proj"))
        for part in chunks:
            h = f.mlp_input(part, weights)
            first.add(h)
            second.add(f.mlp_inner(h, weights))
        shared = _factor(first)
        return {"gate_proj": shared, "up_proj": shared, "down_proj": _factor(second)}
    routes = [f.route(f.mlp_input(part, weights), weights) for part in chunks]
    moe = f.layer.mlp
    assign = Assignment(routes, moe.experts, wanted=max(f.spec.hidden_size, moe.intermediate_size))
    found: dict[str, Factor] = {}
    for e in range(moe.experts):
        first = Moments(f.spec.hidden_size, device)
        second = Moments(moe.intermediate_size, device)
        for number, part in enumerate(chunks):
            rows = assign.rows(number, e)
            if rows.numel():
                h = f.mlp_input(part, weights).flatten(0, 1)[rows]
                first.add(h)
                second.add(f.expert_inner(h, weights, e))
        shared = _factor(first)
        found[f"experts.{e}.gate_proj"] = found[f"experts.{e}.up_proj"] = shared
        found[f"experts.{e}.down_proj"] = _factor(second)
    return found


def _encoded(
    slots: Mapping[str, Slot],
    weights: Mapping[str, Tensor],
    factors: Mapping[str, Factor],
    table: Sequence[Mapping[str, Option]],
) -> dict[tuple[str, Option], Tensor]:
    """Every distinct option of every matrix, as the weights (K, N) in half precision that come out."""
    tried: dict[tuple[str, Option], Tensor] = {}
    for key, factors_here in factors.items():
        for row in table:
            wanted = row[key.rpartition(".")[2]]
            if (key, wanted) not in tried:
                encoded = encode(weights[key], factors_here, wanted.layout(slots[key].inputs), CLASSIC)
                tried[key, wanted] = encoded.weight().half()
    return tried


def _errors(
    half: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
    chunks: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    keys: Sequence[str],
    table: Sequence[Mapping[str, Option]],
    tried: Mapping[tuple[str, Option], Tensor],
) -> tuple[list[float], list[Tensor]]:
    """Mean over rows of ||Y_q - Y|| / ||Y|| for every row of the table; and Y."""
    truth = [half(part, weights) for part in chunks]
    errors = []
    for row in table:
        changed = {**weights, **{key: tried[key, row[key.rpartition(".")[2]]].float() for key in keys}}
        ratios = [
            (half(part, changed) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1).clamp_min(1e-30)
            for part, y in zip(chunks, truth, strict=True)
        ]
        errors.append(max(float(torch.cat(ratios).mean()), 1e-9))
    return errors, truth


def attainable(slots: Sequence[tuple[str, int, int, bool]]) -> Range:
    """Least and most bits per weight of matrices (path, inputs, outputs, biased) with the options of the tables."""
    weights = sum(inputs * outputs for _, inputs, outputs, _ in slots)
    totals = []
    for pick in (0, -1):
        total = 0
        for path, inputs, outputs, biased in slots:
            part = _part(path)
            table = CLASSIC_ATTENTION if part in CLASSIC_ATTENTION[0] else CLASSIC_MLP
            total += stored_bits(table[pick][part].layout(inputs), inputs, outputs, biased=biased)
        totals.append(total / weights)
    return Range(totals[0], totals[1])


def choose(halves: Sequence[Rows], target: float) -> dict[str, Layout]:
    """path -> layout for at most `target` bits per weight over all halves. Raises ConvertError with the range."""
    sizes = [half.sizes() for half in halves]
    weights = sum(k * n for half in halves for _, k, n, _ in half.slots)
    least, most = (sum(pick(size) for size in sizes) / weights for pick in (min, max))
    if not least <= target:
        raise ConvertError(
            f"{target:g} bits per weight cannot be reached with exllamav2's options: they allow {least:.3f} to "
            f"{most:.3f} for this model",
            hint="use more bits, or --encoder best",
        )
    budget = int(target * weights)
    best: tuple[float, float] | None = None
    for low, high in SWEEPS:
        around = 0.0 if best is None else best[1]
        for step in range(STEPS):
            p = around + low + (high - low) * step / (STEPS - 1)
            worst = max(half.errors[row] for half, row in zip(halves, _solve(halves, sizes, budget, p), strict=True))
            if best is None or worst < best[0]:
                best = (worst, p)
    assert best is not None
    rows = _solve(halves, sizes, budget, best[1])
    return {path: layout for half, row in zip(halves, rows, strict=True) for path, layout in half.layouts(row).items()}


def _solve(halves: Sequence[Rows], sizes: Sequence[Sequence[int]], budget: int, p: float) -> list[int]:
    """A row for every half that minimises sum(error^p); what is left buys next rows, as exllamav2 does."""
    costs = [[error**p for error in half.errors] for half in halves]
    rows = _knapsack(costs, sizes, budget)
    # what rounding sizes up has left: single moves that lower the sum, best gain per bit first
    left = budget - sum(size[row] for size, row in zip(sizes, rows, strict=True))
    while True:
        moves = [
            ((costs[i][rows[i]] - costs[i][row]) / (sizes[i][row] - sizes[i][rows[i]]), i, row)
            for i in range(len(rows))
            for row in range(len(costs[i]))
            if 0 < sizes[i][row] - sizes[i][rows[i]] <= left and costs[i][row] < costs[i][rows[i]]
        ]
        if not moves:
            return _raise(rows, sizes, budget)
        _, i, row = max(moves)
        left -= sizes[i][row] - sizes[i][rows[i]]
        rows[i] = row


def _knapsack(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """A row for every half: the least sum of costs within `budget`, by dynamic programming over the bits spent.

    What a row takes above the least of its half is rounded up to whole units, at least LEAST_CELLS of which make up
    all there is to spend, and CELLS for every half.
    """
    least = [min(size) for size in sizes]
    room = budget - sum(least)
    if room <= 0:
        return [min(zip(size, cost, range(len(size)), strict=True))[2] for size, cost in zip(sizes, costs, strict=True)]
    unit = -(-room // max(LEAST_CELLS, CELLS * len(sizes)))
    cells = room // unit
    total = np.zeros(cells + 1)  # least cost of the halves so far with at most so many units spent
    picks = np.zeros((len(sizes), cells + 1), dtype=np.int8)
    for cost, size, low, pick in zip(costs, sizes, least, picks, strict=True):
        new = np.full(cells + 1, np.inf)
        for row, units in enumerate(-(-(bits - low) // unit) for bits in size):
            if units <= cells:
                here = total[: cells + 1 - units] + cost[row]
                better = here < new[units:]
                new[units:][better] = here[better]
                pick[units:][better] = row
        total = new
    rows, at = [0] * len(sizes), cells
    for i in range(len(sizes) - 1, -1, -1):
        rows[i] = int(picks[i, at])
        at += (sizes[i][rows[i]] - least[i]) // -unit
    return rows


def _raise(rows: list[int], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Lift any half to the next entry of its list while the budget allows, whether or not its error falls."""
    left = budget - sum(size[row] for size, row in zip(sizes, rows, strict=True))
    moved = True
    while moved:
        moved = False
        for i, row in enumerate(rows):
            if row + 1 < len(sizes[i]) and sizes[i][row + 1] - sizes[i][row] <= left:
                left -= sizes[i][row + 1] - sizes[i][row]
                rows[i] = row + 1
                moved = True
    return rows
