"""Scales of a group: exllamav2's rule against its description in float64, the search against what scales really do."""

import numpy as np
import pytest
import torch
from encode_groups import grid_of, slow_code, slow_feedback

from convert import scales as module
from convert.scales import LEAST_UNIT, Scales, classic, neighbours, scale_values, search, unit

WIDTHS = (2, 3, 4, 5, 6, 8)


class Group:
    """Correlated weights with a Hessian's factor, as they come out of a matrix."""

    def __init__(self, seed: int, rows: int = 32, columns: int = 40, size: float = 0.02) -> None:
        pick = np.random.default_rng(seed)
        x = pick.normal(size=(3 * rows, rows)) + pick.normal(size=(3 * rows, 1))
        h = x.T @ x / len(x) + 0.1 * np.eye(rows)
        self.h = h
        self.u = torch.from_numpy(np.linalg.cholesky(np.linalg.inv(h)).T.copy()).float()
        w = pick.standard_t(5, size=(rows, columns)) * np.exp(0.3 * pick.normal(size=columns)) * size
        self.w = torch.from_numpy(w).float()
        self.row_weights = 1 / self.u.diagonal().square()

    def lost(self, scales: Scales, bits: int) -> float:
        """What quantizing with error feedback costs: tr((W - Q)^T H (W - Q)) with Q from float64."""
        _, q, _ = slow_feedback(self.w, self.u, scales.values(), bits)
        off = self.w.double().numpy() - q
        return float(np.sum(off * (self.h @ off)))


def legal(scales: Scales, columns: int) -> None:
    assert scales.codes.dtype == torch.uint8 and scales.codes.shape == (columns,)
    assert int(scales.codes.min()) >= 1 and int(scales.codes.max()) <= 16
    assert scales.maximum.dtype == torch.float16 and scales.maximum.dim() == 0
    assert bool(scales.maximum.isfinite()) and float(scales.maximum) >= 0
    assert bool(scales.values().isfinite().all())


# --- what stored scales mean -------------------------------------------------------------------------------------


def test_stored_scales_round_twice() -> None:
    """numpy's halves: every maximum that a half can hold between 0 and 1, subnormals included, and some above."""
    maxima = torch.arange(0, 0x3C00, 7).to(torch.int16).view(torch.float16)
    maxima = torch.cat([maxima, torch.tensor([1.5, 300.0, 65504.0]).half()])
    with np.errstate(over="ignore"):
        wanted = (maxima.numpy().astype(np.float32) / np.float32(256)).astype(np.float16)
        assert np.array_equal(unit(maxima).numpy(), wanted.astype(np.float32))
        for code in range(1, 17):
            values = scale_values(torch.full(maxima.shape, code), unit(maxima)).numpy()
            by_hand = (np.float16(code * code) * wanted).astype(np.float32)
            assert np.array_equal(values, by_hand)
    pair = Scales(torch.tensor([16, 3], dtype=torch.uint8), torch.tensor(0.001).half())
    assert pair.values().tolist() == [256 * 66 * 2.0**-24, 9 * 66 * 2.0**-24]  # the example of formats/exl2.md 4


def test_neighbours_stay_in_range() -> None:
    near = neighbours(torch.tensor([1, 2, 9, 16], dtype=torch.uint8), 2)
    assert near.dtype == torch.uint8
    assert near.t().tolist() == [[1, 1, 1, 2, 3], [1, 1, 2, 3, 4], [7, 8, 9, 10, 11], [14, 15, 16, 16, 16]]


# --- classic -----------------------------------------------------------------------------------------------------


def slow_classic(w: torch.Tensor, bits: int) -> tuple[np.ndarray, float, np.ndarray]:
    """formats/exl2.md 6.3, sentence by sentence, in float64: scale codes, m, error of every p."""
    w = w.double().numpy()
    maxq = 2**bits - 1
    base = (np.abs(w).max(axis=0) + 1e-12) / (maxq / 2)
    m = base.max()
    codes = np.clip(np.rint(16 * np.sqrt(base / m)), 1, 16)
    t = (codes / 16) ** 2 * m
    errors = []
    for i in range(97):
        p = 0.70 * (1 - i / 96) + 1.2 * (i / 96)
        q = np.clip(np.rint(w / (t * p)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * t * p
        errors.append(np.sum(np.abs(q - w) ** 3.5))
    return codes, float(m), np.array(errors)


def chosen_p(maximum: torch.Tensor, m: float) -> int:
    """The step whose p gives the stored maximum."""
    every = [np.float16(np.float32(m * (0.70 * (1 - i / 96) + 1.2 * (i / 96)))) for i in range(97)]
    return min(range(97), key=lambda i: abs(float(every[i]) - float(maximum)))


@pytest.mark.parametrize("bits", WIDTHS)
def test_classic_is_the_rule_as_described(bits: int) -> None:
    same = 0
    for seed in range(12):
        w = Group(seed, rows=(32, 64, 128)[seed % 3]).w
        scales = classic(w, bits)
        legal(scales, 40)
        codes, m, errors = slow_classic(w, bits)
        assert np.array_equal(scales.codes.numpy(), codes)
        step = chosen_p(scales.maximum, m)
        assert float(scales.maximum) == pytest.approx(m * (0.70 + 0.5 * step / 96), rel=2**-11)
        assert errors[step] <= errors.min() * (1 + 1e-5)  # float32 sums may tie where float64 does not
        same += step == errors.argmin()
    assert same >= 11


def test_the_first_of_equal_factors_wins() -> None:
    """Zeros cost nothing at any p."""
    assert slow_classic(torch.zeros(32, 3), 4)[2].argmin() == 0
    scales = classic(torch.zeros(32, 3), 4)
    assert scales.codes.tolist() == [16, 16, 16] and float(scales.maximum) == 0


# --- search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
def test_search_beats_the_classic_rule(bits: int) -> None:
    """By the true loss after error feedback, which float64 tells."""
    ratios = []
    for seed in range(6):
        group = Group(100 + seed)
        found = search(group.w, bits, group.row_weights, group.u)
        legal(found, 40)
        ratios.append(group.lost(found, bits) / group.lost(classic(group.w, bits), bits))
    assert sum(ratio <= 1 for ratio in ratios) >= 5
    assert max(ratios) < 1.02
    assert np.exp(np.mean(np.log(ratios))) < 0.95


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_finalists_are_judged_by_feedback(bits: int) -> None:
    """No scale code near a chosen one does better in its column, at the chosen maximum."""
    group = Group(7)
    found = search(group.w, bits, group.row_weights, group.u)

    def by_column(codes: torch.Tensor) -> np.ndarray:
        _, _, errors = slow_feedback(group.w, group.u, scale_values(codes, unit(found.maximum)), bits)
        return np.sum(errors**2, axis=0)

    mine = by_column(found.codes)
    for step in (-1, 1):
        other = (found.codes.int() + step).clamp(1, 16).to(torch.uint8)
        better = by_column(other) < mine * (1 - 1e-5)
        assert better.mean() <= 0.1  # those at the edge of the five that were tried


@pytest.mark.parametrize("bits", [2, 3, 6])
def test_without_feedback_the_weighted_error_is_least(bits: int) -> None:
    """All 16 codes at the found maximum: none is better in any column; and the whole beats the classic rule."""
    for seed in range(5):
        group = Group(seed)
        weights = torch.from_numpy(np.random.default_rng(seed).exponential(size=32)).float()
        found = search(group.w, bits, weights, None)
        legal(found, 40)

        def by_column(scales: torch.Tensor, group: Group = group, weights: torch.Tensor = weights) -> np.ndarray:
            lost = []
            for n, scale in enumerate(scales.tolist()):
                w = group.w[:, n].double().numpy()
                q = grid_of(scale, bits)[slow_code(w, scale, bits) + 2 ** (bits - 1)]
                lost.append(np.sum(weights.double().numpy() * (w - q) ** 2))
            return np.array(lost)

        mine = by_column(found.values())
        every = [by_column(scale_values(torch.full((40,), s), unit(found.maximum))) for s in range(1, 17)]
        assert np.all(mine <= np.min(every, axis=0) * (1 + 1e-5))
        assert mine.sum() <= by_column(classic(group.w, bits).values()).sum()


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("size", "bound"),
    [
        (0.0, 0.0),
        (1e-12, 1e-11),  # below every scale that can be stored
        (2.0**-24, 2.0**-20),
        (1e-5, 0.0),
        (1e-4, 0.0),  # the unit of the group is subnormal
    ],
    ids=["zero", "vanishing", "smallest half", "1e-5", "1e-4"],
)
def test_tiny_weights(size: float, bound: float, bits: int, feedback: bool) -> None:
    """Legal scales; the error is no larger than that of leaving the weights out, nor than a step of the grid."""
    group = Group(3, size=size)
    found = search(group.w, bits, group.row_weights, group.u if feedback else None)
    for scales in (found, classic(group.w, bits)):
        legal(scales, 40)
    assert float(unit(found.maximum)) >= LEAST_UNIT
    w = group.w.double().numpy()
    columns = enumerate(found.values().tolist())
    q = np.stack([grid_of(s, bits)[slow_code(w[:, n], s, bits) + 2 ** (bits - 1)] for n, s in columns], axis=1)
    assert np.sum((w - q) ** 2) <= np.sum(w**2) * (1 + 1e-9)
    if size >= 1e-5:  # there is something to store, and it is stored
        assert np.sum((w - q) ** 2) < np.sum(w**2) * (0.7 if bits == 2 else 0.2)
    if bound:
        assert np.abs(w - q).max() <= bound


@pytest.mark.parametrize("outlier", [1.0, 5.0, 1000.0, 30000.0])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_single_huge_weight(bits: int, outlier: float) -> None:
    """One column asks for all of the range; scales stay legal and the outlier itself survives."""
    group = Group(5)
    group.w[11, 4] = outlier
    for scales in (classic(group.w, bits), search(group.w, bits, group.row_weights, group.u)):
        legal(scales, 40)
        scale = float(scales.values()[4])
        held = grid_of(scale, bits)[slow_code(np.array([outlier]), scale, bits) + 2 ** (bits - 1)]
        assert abs(held[0] - outlier) <= 0.51 * scale
    if outlier <= 5:  # beyond, the whole loss is how well the outlier falls onto a step: the classic rule tries more
        assert group.lost(scales, bits) <= group.lost(classic(group.w, bits), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_at_the_end_of_half_precision(bits: int) -> None:
    group = Group(5)
    group.w *= 65504 / group.w.abs().max()
    for scales in (classic(group.w, bits), search(group.w, bits, group.row_weights, group.u)):
        legal(scales, 40)
    with np.errstate(over="ignore"):  # of grid values that no weight takes
        _, q, _ = slow_feedback(group.w, group.u, scales.values(), bits)
    assert np.isfinite(q).all()


def test_dead_columns_and_rows() -> None:
    """Columns of zeros beside others, rows that cost nothing: legal, and the dead columns stay zero."""
    group = Group(9)
    group.w[:, ::3] = 0
    weights = group.row_weights.clone()
    weights[::2] = 0
    for u in (group.u, None):
        found = search(group.w, 3, weights, u)
        legal(found, 40)
        _, q, _ = slow_feedback(group.w, torch.eye(32), found.values(), 3)
        assert not q[:, ::3].any() and q[:, 1::3].any()


def test_what_overflows_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates beyond half precision are never chosen while there is another one."""
    monkeypatch.setattr(module, "HIGHEST", 1e6)
    group = Group(2, size=5.0)
    for u in (group.u, None):
        legal(search(group.w, 4, group.row_weights, u), 40)
