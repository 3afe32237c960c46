"""What a layer's pass is made of: the choice of rows for experts, and one matrix from its moments."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from convert import layerpass as module
from convert.encoder import BEST, CLASSIC, Recipe
from convert.layerpass import Assignment, encode_matrix

# --- which rows an expert gets -----------------------------------------------------------------------------------


def routes_of(logits: Tensor, pieces: list[int], k: int = 2) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(torch.ones(len(part), k), part.topk(k).indices, part) for part in logits.split(pieces)]


def rows_of(assign: Assignment, pieces: list[int], expert: int) -> list[int]:
    starts = [sum(pieces[:i]) for i in range(len(pieces))]
    return [start + int(row) for i, start in enumerate(starts) for row in assign.rows(i, expert)]


@pytest.mark.parametrize("pieces", [[60], [20, 20, 20], [1, 58, 1]])
def test_the_next_best_rows_are_borrowed(pieces: list[int]) -> None:
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    logits[:, 4] -= 2.0  # rare
    assign = Assignment(routes_of(logits, pieces), 5, wanted=25)
    for e in range(5):
        routed = {r for r in range(60) if e in logits[r].topk(2).indices.tolist()}
        rows = rows_of(assign, pieces, e)
        assert rows == sorted(set(rows)) and routed <= set(rows)
        assert len(rows) == max(len(routed), 25)
        extra = set(rows) - routed
        assert assign.routed[e] == len(routed) and assign.borrowed[e] == len(extra)
        others = [r for r in range(60) if r not in rows]
        assert not extra or min(logits[r, e] for r in extra) >= max(logits[r, e] for r in others)
        if extra:
            assert assign.flags(e) == (f"{len(routed)} tokens routed, {len(extra)} more borrowed from the next best",)
        else:
            assert assign.flags(e) == ()
    assert assign.borrowed[4] > 0 and not all(assign.borrowed)


def test_more_wanted_than_there_are() -> None:
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(3))
    logits[:, 2] = -9.0  # ties: the first rows
    assign = Assignment(routes_of(logits, [4, 6], k=1), 3, wanted=64)
    assert [rows_of(assign, [4, 6], e) for e in range(3)] == [list(range(10))] * 3
    few = Assignment(routes_of(logits, [4, 6], k=1), 3, wanted=5)
    assert rows_of(few, [4, 6], 2) == [0, 1, 2, 3, 4]
    assert few.flags(2) == ("0 tokens routed, 5 more borrowed from the next best",)


# --- one matrix --------------------------------------------------------------------------------------------------


@dataclass
class Given:
    """Moments whose H is given."""

    hessian: Tensor

    def target(self, weight: Tensor, *, strength: float = 1.0) -> Tensor:
        return (1 + strength) * weight


def indefinite(lowest: float, size: float = 1.0) -> Tensor:
    h = torch.eye(64)
    h[0, 1] = h[1, 0] = 1 - lowest
    return size * h


@pytest.mark.parametrize(
    ("hessian", "recipe", "flags"),
    [
        (torch.eye(64), BEST, ()),
        (torch.eye(64), CLASSIC, ()),
        (1e-7 * torch.eye(64), BEST, ()),
        (1e-7 * torch.eye(64), CLASSIC, ()),  # the floor is the recipe's own
        (indefinite(-0.13), BEST, ("Hessian damped by 0.15",)),
        (indefinite(-0.13, 1e-5), BEST, ("Hessian damped by 0.15",)),
        (indefinite(-0.13), CLASSIC, ("Hessian damped by 0.24",)),
        (indefinite(-2.0), BEST, ("rounded: its Hessian is not positive definite",)),
        (torch.zeros(64, 64), BEST, ("rounded: its Hessian is not positive definite",)),
        (torch.full((64, 64), float("nan")), CLASSIC, ("rounded: its Hessian is not positive definite",)),
    ],
)
def test_flags_tell_of_trouble_with_the_hessian(hessian: Tensor, recipe: Recipe, flags: tuple[str, ...]) -> None:
    weight = 0.1 * torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    made = encode_matrix(weight, Given(hessian), ((4, 64),), replace(recipe, sweeps=0), correct=False)
    assert made.flags == flags
    assert bool(made.encoded.weight().isfinite().all())
    assert 0 <= made.error < 1


@pytest.mark.parametrize("correct", [True, False])
def test_the_error_is_that_of_the_outputs(correct: bool) -> None:
    pick = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=pick) + torch.randn(500, 1, generator=pick)
    weight = 0.1 * torch.randn(64, 12, generator=pick)
    made = encode_matrix(weight, Given(x.t() @ x / 500), ((3, 64),), BEST, correct=correct)
    aim = (1 + module.CORRECTION) * weight if correct else weight
    wanted = (x @ aim).double()
    error = float(((x @ made.encoded.weight()).double() - wanted).norm() / wanted.norm())
    assert made.error == pytest.approx(error, rel=1e-3) and 0.05 < error < 0.25


def test_nothing_to_encode_has_no_error() -> None:
    made = encode_matrix(torch.zeros(64, 8), Given(torch.eye(64)), ((4, 64),), BEST, correct=False)
    assert made.error == 0.0 and not made.encoded.weight().any()
