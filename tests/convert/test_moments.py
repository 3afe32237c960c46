"""Second moments and factors against float64 numpy."""

import numpy as np
import pytest
import torch

from convert import moments as module
from convert.moments import DAMPING_STEPS, Moments, factor, inverse_upper

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs as a model has them: a few common directions, channels of very different size."""
    common = random(tokens, 6, seed=seed) @ random(6, width, seed=seed + 1)
    return (common + random(tokens, width, seed=seed + 2)) * random(width, seed=seed + 3).exp()


def collected(y, x=None, residual=None, *, steps: int = 3) -> Moments:
    moments = Moments(y.shape[-1], CPU, outputs=None if residual is None else residual.shape[-1])
    parts = [None if t is None else t.split(-(-len(y) // steps)) for t in (y, x, residual)]
    for i in range(len(parts[0])):
        moments.add(*(None if part is None else part[i] for part in parts))
    return moments


@pytest.mark.parametrize("wide", [False, True], ids=["float64", "float32"])
def test_the_hessian_is_the_mean_outer_product(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(module, "WIDE", 40)
    y = correlated(300, 40, 1).view(6, 50, 40)
    moments = collected(y)
    flat = y.reshape(300, 40).double().numpy()
    wanted = flat.T @ flat / 300
    assert moments.tokens == 300 and not moments.has_residual
    assert moments.hessian.dtype == torch.float32
    assert np.abs(moments.hessian.numpy() - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_no_tokens_no_hessian() -> None:
    moments = Moments(32, CPU)
    assert not moments.hessian.any()
    weight = random(32, 5)
    assert torch.equal(moments.target(weight), weight)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize("damping", [0.02, 1e-4])
def test_the_target_is_the_least_squares_solution(wide, residual, damping, monkeypatch: pytest.MonkeyPatch) -> None:
    """min |Y W' - (X W + R)|^2 + a |W' - W|^2, a = damping * mean(diag Y^T Y), solved as one tall system."""
    if wide:
        monkeypatch.setattr(module, "WIDE", 40)
    tokens, inputs, outputs = 500, 40, 7
    x = correlated(tokens, inputs, 5)
    y = x + 0.2 * x.roll(1, 1) + 0.1 * random(tokens, inputs, seed=9)
    r = 0.3 * (y @ random(inputs, outputs, seed=10)) + random(tokens, outputs, seed=11) if residual else None
    weight = random(inputs, outputs, seed=12)
    ours = collected(y, x, r).target(weight, damping=damping).double().numpy()

    y64, x64, w64 = (t.double().numpy() for t in (y, x, weight))
    wanted = x64 @ w64 + (r.double().numpy() if residual else 0)
    ridge = np.sqrt(damping * np.mean(np.sum(y64**2, axis=0)))
    tall = np.concatenate([y64, ridge * np.eye(inputs)])
    solution, *_ = np.linalg.lstsq(tall, np.concatenate([wanted, ridge * w64]), rcond=None)
    assert np.linalg.norm(solution - w64) > 0.1 * np.linalg.norm(w64)  # there is something to correct
    # Products are float32; the weaker the damping, the more the solution makes of their rounding.
    bound = 2e-4 if damping > 1e-3 else 1e-3
    assert np.linalg.norm(ours - solution) <= bound * np.linalg.norm(solution - w64)

    half = collected(y, x, r).target(weight, damping=damping, strength=0.5).double().numpy()
    assert np.allclose(half, (ours + w64) / 2, atol=1e-6 * np.abs(ours).max())


def test_equal_streams_need_no_correction() -> None:
    y, weight = correlated(200, 32, 2), random(32, 9)
    assert torch.equal(collected(y, y.clone()).target(weight), weight)
    assert torch.equal(collected(y).target(weight), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_target_is_finite_whatever_came_in(value: float) -> None:
    x = random(100, 32)
    y = x + 0.1
    y[50, 7] = value
    weight = random(32, 9)
    assert torch.equal(collected(y, x).target(weight), weight)
    x[50, 7], y[50, 7] = value, 0.0
    assert torch.equal(collected(y, x).target(weight), weight)


# --- factors -----------------------------------------------------------------------------------------------------


def hessian_of(width: int, seed: int = 0) -> torch.Tensor:
    return collected(correlated(4 * width, width, seed)).hessian


def test_rows_are_sorted_stably() -> None:
    diagonal = torch.tensor([3.0, 1.0, 3.0, 0.0, 7.0, 1.0, 0.0, 3.0])
    found = factor(torch.diag(diagonal), damping=0.1)
    assert found.perm.tolist() == [4, 0, 2, 7, 1, 5, 3, 6]
    assert found.perm.dtype == torch.int64
    assert found.h.diagonal().tolist() == sorted(diagonal.tolist(), reverse=True)
    kept = factor(torch.diag(diagonal), damping=0.1, order=False)
    assert kept.perm.tolist() == list(range(8)) and torch.equal(kept.h, torch.diag(diagonal))


def test_h_is_permuted_and_not_damped_and_the_input_is_kept() -> None:
    for dtype in (torch.float32, torch.float64):
        h = hessian_of(40).to(dtype)
        before = h.clone()
        for order in (True, False):
            found = factor(h, damping=0.3, order=order)
            assert torch.equal(found.h, h[found.perm][:, found.perm])
            assert torch.equal(h, before)


def test_u_is_the_factor_of_the_damped_inverse() -> None:
    found = factor(hessian_of(64), damping=0.07)
    assert found.damping == pytest.approx(0.07)
    h, u = found.h.double().numpy(), found.u.double().numpy()
    damped = h + 0.07 * np.mean(np.diag(h)) * np.eye(64)
    assert not np.tril(u, -1).any()
    assert np.abs(u.T @ u @ damped - np.eye(64)).max() < 1e-4
    # What GPTQ uses of it: squares of the diagonal are the variances left when all rows behind are free.
    left = [np.linalg.inv(damped[r:, r:])[0, 0] for r in range(64)]
    assert np.allclose(np.diag(u) ** 2, left, rtol=1e-4)


def test_inverse_upper_in_float64() -> None:
    h = hessian_of(48, 3).double() + 0.01 * torch.eye(48, dtype=torch.float64)
    u = inverse_upper(h)
    assert u.dtype == torch.float64
    torch.testing.assert_close(u.t() @ u, torch.linalg.inv(h), rtol=1e-9, atol=1e-12)


def test_an_inverse_beyond_the_dtype_is_none() -> None:
    """H itself has a factor here, but its inverse overflows."""
    assert inverse_upper(1e-310 * torch.eye(8, dtype=torch.float64)) is None


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_what_has_no_inverse_has_no_factor(value: float) -> None:
    h = torch.eye(8)
    h[3, 3] = value
    assert inverse_upper(h) is None


def test_the_damping_is_at_least_the_floor() -> None:
    found = factor(1e-6 * torch.eye(8), damping=0.12, floor=1e-5)
    assert found.damping == pytest.approx(10)
    assert found.u.diagonal().square().tolist() == pytest.approx([1 / 1.1e-5] * 8)
    assert factor(torch.eye(8), damping=0.12, floor=1e-5).damping == pytest.approx(0.12)


def indefinite(lowest: float) -> torch.Tensor:
    """Unit diagonal, and an eigenvalue of `lowest`."""
    h = torch.eye(32)
    h[0, 1] = h[1, 0] = 1 - lowest
    return h


@pytest.mark.parametrize(("lowest", "attempts"), [(0.5, 1), (-0.05, 1), (-0.15, 2), (-0.25, 3), (-0.95, 10)])
def test_the_damping_grows_until_it_is_enough(lowest: float, attempts: int) -> None:
    found = factor(indefinite(lowest), damping=0.1)
    assert found.damping == pytest.approx(0.1 * attempts)
    damped = found.h + found.damping * torch.eye(32)
    torch.testing.assert_close(found.u.t() @ found.u @ damped, torch.eye(32), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "hessian",
    [torch.zeros(32, 32), indefinite(-1.05), torch.full((32, 32), float("nan")), torch.eye(32) * float("inf")],
    ids=["zero", "indefinite", "NaN", "infinite"],
)
def test_hopeless_hessians_have_no_factor(hessian: torch.Tensor) -> None:
    found = factor(hessian, damping=1 / DAMPING_STEPS)
    assert found.u is None and found.damping == float("inf")
    assert sorted(found.perm.tolist()) == list(range(32))


def test_one_bad_value_is_enough() -> None:
    h = hessian_of(32)
    h[5, 6] = h[6, 5] = float("nan")
    assert factor(h, damping=0.1).u is None
