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


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, the sign of zero included; 16- and 32-bit floats."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
