"""How tests judge numbers: bounds that come from arithmetic, not from trying."""

from torch import Tensor


def assert_as_good_as(
    actual: Tensor, naive: Tensor, oracle: Tensor, *, factor: float = 2.0, floor: float = 1e-6
) -> None:
    """Worst error of `actual` against a float64 oracle, judged by naive torch code in the same dtype.

    floor  allowed error relative to the largest oracle value, for cases where the naive code happens to be exact
    """
    assert actual.shape == oracle.shape == naive.shape, (actual.shape, naive.shape, oracle.shape)
    if not oracle.numel():
        return

    def worst(t: Tensor) -> float:
        return (t.double() - oracle).abs().max().item()

    bound = factor * worst(naive) + floor * oracle.abs().max().item()
    assert worst(actual) <= bound, f"max error {worst(actual):.3g} > {bound:.3g}"  # NaN fails too


# Of a product, relative: errors of inputs are uniform over their span's largest / 32512. That is 2.6 / sqrt(12) of it.
INPUT_ROUNDING = 2.3e-5


def assert_inputs_rounded(actual: Tensor, oracle: Tensor, products: int) -> None:
    """Bound for the logits of a model of packed CPU kernels (ext/cpu/linear_packed.h), against float64.

    Errors of `products` matrix products one behind the other are independent, so they add as squares. Factor 2: what
    lies between them may pass on more than it got. No logit is off by more than 6 standard deviations of that.
    """
    drift = 2 * products**0.5 * INPUT_ROUNDING
    error, size = actual.double() - oracle, oracle.norm()
    assert float(error.norm()) <= drift * float(size), f"{float(error.norm() / size):.3g} > {drift:.3g} of the logits"
    worst, rms = float(error.abs().max()), float(size) / oracle.numel() ** 0.5
    assert worst <= 6 * drift * rms, f"max error {worst:.3g} > {6 * drift * rms:.3g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, the sign of zero included; 16- and 32-bit floats."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
