"""One matrix to codes: GPTQ error feedback over groups of rows, then refinement. Knows no model and no files.

Notation: W (K, N) the wanted weights, Q what the codes stand for, H and U as in `moments`, rows in stored order.
Everything is dense matrix work, independent from column to column.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exl_runtime.ops import encode as ops

from .encoded import Encoded, Layout
from .layouts import uniform
from .moments import FLOOR, Factor, inverse_upper
from .scales import Scales, classic, neighbours, scale_values, search, unit

ENOUGH = 1e-6  # a column is encoded anew only for a true gain, not for rounding noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How matrices are encoded.

    scales   "classic": exllamav2's rule; "search": by the error after feedback
    damping  added to diag(H) before it is factored, relative to its mean;  floor: the least, absolute
    sweeps   of refinement on H + `sweep_damping` * mean(diag H)
    """

    scales: Literal["classic", "search"]
    damping: float
    floor: float = 0.0
    sweeps: int = 0
    sweep_damping: float = 0.05


CLASSIC = Recipe(scales="classic", damping=0.12, floor=FLOOR)  # formats/exl2.md 6.2-6.4
BEST = Recipe(scales="search", damping=0.05, sweeps=2)
QUICK = Recipe(scales="search", damping=0.05)  # for measuring: what refinement gains is much the same everywhere


def encode(weight: Tensor, factor: Factor, layout: Layout, recipe: Recipe) -> Encoded:
    """Codes for `weight` float32 (K, N), rows in the model's order. A factor without `u` means plain rounding."""
    wanted = weight[factor.perm]
    state = _State(wanted, layout)
    if factor.u is None:
        for index, (bits, start, stop) in enumerate(state.groups):
            state.round(index, _scales(wanted[start:stop], bits, None, recipe, factor.h[start:stop, start:stop]))
    else:
        for index, (scales, codes, q, _) in enumerate(_feedback(wanted, factor.u, layout, recipe)):
            state.put(index, scales, codes, q)
    if factor.u is not None and recipe.sweeps:
        _refine(state, factor, recipe)
    return Encoded(
        layout=layout,
        codes=state.codes,
        scale_codes=state.scale_codes,
        scale_max=state.maxima,
        perm=factor.perm,
    )


def _feedback(
    wanted: Tensor, u: Tensor, layout: Layout, recipe: Recipe
) -> Iterator[tuple[Scales, Tensor, Tensor, Tensor]]:
    """GPTQ: (scales, codes, q, errors) of every group; what a group gets wrong, the rows behind it make good."""
    left = wanted.clone()
    start = 0
    for bits, rows in layout:
        stop = start + rows
        w, block = left[start:stop], u[start:stop, start:stop].contiguous()
        scales = _scales(w, bits, block, recipe, None)
        codes, q, errors = ops.feedback_encode(w, block, scales.values(), bits)
        yield scales, codes, q, errors
        if stop < left.shape[0]:
            left[stop:] -= u[start:stop, stop:].t() @ errors
        start = stop


class _State:
    """The matrix being encoded, in stored row order."""

    def __init__(self, wanted: Tensor, layout: Layout) -> None:
        rows, columns = wanted.shape
        device = wanted.device
        self.wanted = wanted
        self.q = torch.zeros_like(wanted)
        self.codes = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        self.scale_codes = torch.ones(len(layout), columns, dtype=torch.uint8, device=device)
        self.maxima = torch.zeros(len(layout), dtype=torch.float16, device=device)
        self.groups: list[tuple[int, int, int]] = []
        start = 0
        for bits, count in layout:
            self.groups.append((bits, start, start + count))
            start += count

    def put(self, index: int, scales: Scales, codes: Tensor, q: Tensor) -> None:
        _, start, stop = self.groups[index]
        self.codes[start:stop] = codes
        self.q[start:stop] = q
        self.scale_codes[index] = scales.codes
        self.maxima[index] = scales.maximum

    def round(self, index: int, scales: Scales) -> None:
        """Round to nearest; code 0 where the scale is 0, as in `ops.encode`."""
        bits, start, stop = self.groups[index]
        w = self.wanted[start:stop]
        values = scales.values()
        codes = torch.round(w / torch.where(values > 0, values, torch.inf))
        codes.clamp_(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
        self.put(index, scales, codes.to(torch.int8), (codes * values).half().float())


def _scales(w: Tensor, bits: int, u: Tensor | None, recipe: Recipe, h: Tensor | None) -> Scales:
    if recipe.scales == "classic":
        return classic(w, bits)
    if u is not None:
        return search(w, bits, u.diagonal().square().reciprocal(), u)
    importance = torch.ones(w.shape[0], device=w.device)
    if h is not None and bool(torch.isfinite(h.diagonal()).all()) and float(h.diagonal().sum()) > 0:
        importance = h.diagonal() + 1e-6 * h.diagonal().mean()
    return search(w, bits, importance.contiguous(), None)


def _refine(state: _State, factor: Factor, recipe: Recipe) -> None:
    """Coordinate descent on tr((W - Q)^T H (W - Q)): each group encoded anew given the others, then row by row.

    H carries its own damping: on a bare one the sweeps fit the calibration tokens (encoder.md 2).
    """
    h = factor.h.clone()
    h.diagonal().add_(recipe.sweep_damping * float(h.diagonal().mean()))
    gradient = h @ (state.wanted - state.q)
    for _ in range(recipe.sweeps):
        for index in range(len(state.groups)):
            _encode_again(state, index, h, gradient)
        for index, (bits, start, stop) in enumerate(state.groups):
            block = h[start:stop, start:stop].contiguous()
            values = scale_values(state.scale_codes[index], unit(state.maxima[index]))
            codes, q, delta = ops.descend(state.q[start:stop], gradient[start:stop].contiguous(), block, values, bits)
            state.codes[start:stop] = codes
            state.q[start:stop] = q
            gradient += h[:, start:stop] @ delta


def _encode_again(state: _State, index: int, h: Tensor, gradient: Tensor) -> None:
    """Give the columns of one group other scale codes and codes where that lowers the error."""
    bits, start, stop = state.groups[index]
    block = h[start:stop, start:stop].double()
    u = inverse_upper(block)
    if u is None:
        return
    u = u.float().contiguous()
    old = state.q[start:stop]
    # Where the group would go if its weights were free and every other group stayed.
    free = old + torch.cholesky_solve(gradient[start:stop].double(), torch.linalg.cholesky(block)).float()
    off = free - old
    current = (off * (block.float() @ off)).sum(dim=0)
    near = neighbours(state.scale_codes[index], 1)
    values = scale_values(near, unit(state.maxima[index]))
    choice, loss = ops.feedback_best(free, u, values, bits)
    better = loss < current * (1 - ENOUGH)
    if not bool(better.any()):
        return
    picked = torch.where(better, near.gather(0, choice[None].long())[0], state.scale_codes[index])
    codes, q, _ = ops.feedback_encode(free, u, scale_values(picked, unit(state.maxima[index])), bits)
    q = torch.where(better, q, old)
    gradient += h[:, start:stop] @ (old - q)
    state.codes[start:stop] = torch.where(better, codes, state.codes[start:stop])
    state.q[start:stop] = q
    state.scale_codes[index] = picked


@dataclass(frozen=True, slots=True)
class Trial:
    """A matrix encoded at one width to see what it costs. rows_lost float32 (K, N): errors^2, stored row order.

    Summed over rows they are (W - Q)^T (H + damping) (W - Q) on the diagonal: the squared output error per token of
    every column. weight float32 (K, N): Q in the model's row order.
    """

    rows_lost: Tensor
    weight: Tensor


def attempt(weight: Tensor, factor: Factor, bits: int, size: int, recipe: Recipe = QUICK) -> Trial:
    """Encode `weight` (K, N) at `bits` everywhere in groups of `size` rows, without refinement. Needs factor.u."""
    assert factor.u is not None
    wanted = weight[factor.perm]
    found = list(_feedback(wanted, factor.u, uniform(wanted.shape[0], bits, size), recipe))
    whole = torch.empty_like(wanted)
    whole[factor.perm] = torch.cat([q for _, _, q, _ in found])
    return Trial(torch.cat([errors for _, _, _, errors in found]).square(), whole)
