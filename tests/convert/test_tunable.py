"""What learns in tuning: values as stored to the bit, gradients against autograd on the format's formula in float64."""

import pytest
import torch
from oracles import same_bits

from convert.encoded import Encoded
from convert.tunable import TunableMatrix, TunableTensor

LAYOUT = ((5, 32), (3, 64), (2, 32))
ROWS, COLUMNS = 128, 48


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoded() -> Encoded:
    generator = torch.Generator().manual_seed(1)
    codes = torch.cat(
        [torch.randint(-(2 ** (b - 1)), 2 ** (b - 1), (rows, COLUMNS), generator=generator) for b, rows in LAYOUT]
    )
    return Encoded(
        layout=LAYOUT,
        codes=codes.to(torch.int8),
        scale_codes=torch.randint(1, 17, (3, COLUMNS), generator=generator).to(torch.uint8),
        scale_max=torch.tensor([0.02, 0.004, 0.31]).half(),
        perm=torch.randperm(ROWS, generator=generator),
    )


def moved(encoded: Encoded, by: float) -> TunableMatrix:
    """After steps as the optimizer takes them, `by` grid steps wide."""
    matrix = TunableMatrix(encoded, encoded.weight() + 0.01 * draw(ROWS, COLUMNS, seed=2))
    with torch.no_grad():
        matrix.latent += by * draw(ROWS, COLUMNS, seed=3)
        matrix.growth += 0.05 * by * draw(3, seed=4)
    matrix.clamp()
    return matrix


def test_before_the_first_step_nothing_has_changed(encoded: Encoded) -> None:
    matrix = TunableMatrix(encoded, draw(ROWS, COLUMNS, seed=2))  # however far the source is
    assert same_bits(matrix.weight().detach(), encoded.weight())
    for name in ("codes", "scale_codes", "scale_max", "perm"):
        assert torch.equal(getattr(matrix.export(), name), getattr(encoded, name)), name


@pytest.mark.parametrize("by", [0.3, 1.0, 20.0])
def test_what_is_evaluated_is_what_is_stored(encoded: Encoded, by: float) -> None:
    matrix = moved(encoded, by)
    exported = matrix.export()
    assert (exported.codes != encoded.codes).float().mean() > 0.01
    assert not torch.equal(exported.scale_max, encoded.scale_max)
    assert same_bits(matrix.weight().detach(), exported.weight())
    again = Encoded.from_tensors(exported.tensors(), COLUMNS)  # raises for codes out of range
    assert same_bits(again.weight(), exported.weight())


def test_gradients_pass_straight_through_the_rounding(encoded: Encoded) -> None:
    matrix = moved(encoded, 0.5)
    outer = draw(ROWS, COLUMNS, seed=5)
    (matrix.weight() * outer).sum().backward()
    exported = matrix.export()
    groups = torch.arange(3).repeat_interleave(torch.tensor([rows for _, rows in LAYOUT]))
    codes = exported.codes.double().requires_grad_(True)
    growth = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    stored = codes * exported.scales().double()[groups] * growth.exp()[groups][:, None]
    weight = torch.zeros(ROWS, COLUMNS, dtype=torch.float64).index_copy(0, encoded.perm, stored)
    (weight * outer).sum().backward()
    # Every weight is off by one rounding to half, 2^-11 relative.
    torch.testing.assert_close(matrix.latent.grad.double(), codes.grad, rtol=1e-6, atol=0)
    bound = (outer.abs() * weight.detach().abs()).sum() * 2.0**-11
    assert (matrix.growth.grad - growth.grad).abs().max() <= bound
    assert growth.grad.abs().max() > 20 * bound  # the bound means something


def test_latents_never_leave_for_good(encoded: Encoded) -> None:
    matrix = moved(encoded, 1e4)
    assert matrix.latent.min() >= -16.5 and matrix.latent.max() < 15.5
    high = torch.cat([torch.full((rows, 1), 2.0 ** (bits - 1) - 1) for bits, rows in LAYOUT])
    assert ((matrix.latent <= high + 0.5) & (matrix.latent >= -high - 1.5)).all()


def test_dense_tensors_move_in_units_of_their_size_and_stay_halves() -> None:
    value = draw(64).half().float()
    plain, shifted = TunableTensor(value, 0.0), TunableTensor(value, 8.0)
    assert same_bits(plain.weight().detach(), value)
    for tensor, size in ((plain, value.abs().median()), (shifted, (value + 8).abs().median())):
        with torch.no_grad():
            tensor.move += 0.01
        weight = tensor.weight()
        assert same_bits(weight.detach(), weight.detach().half().float())
        torch.testing.assert_close((weight - value).mean().item(), 0.01 * size.item(), rtol=0.05, atol=0)
        weight.sum().backward()
        torch.testing.assert_close(tensor.move.grad, size.expand(64))
