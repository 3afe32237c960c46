"""A linear layer as the model uses it: a kernel for the stored matrix, and the bias around it."""

from collections.abc import Sequence

from torch import Tensor

from ..ops.linear.base import LinearKernel
from ..ops.linear.together import multiply_together


class Linear:
    """y = x @ W + b. x (..., in_features) -> (..., out_features), dtype of x."""

    __slots__ = ("bias", "kernel")

    def __init__(self, kernel: LinearKernel, bias: Tensor | None = None) -> None:
        self.kernel = kernel
        self.bias = bias  # (out_features,) or None

    def __call__(self, x: Tensor) -> Tensor:
        return self.finish(self.kernel(x), x)

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """y = x @ W, which may be overwritten, with all that comes on top. What stands around a kernel overrides it."""
        return y if self.bias is None else y.add_(self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory by the kernel and the bias."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.kernel.storage_bytes + bias


def project(linears: Sequence[Linear], x: Tensor) -> list[Tensor]:
    """[linear(x) for linear in linears], in one go where the kernels can: x is then prepared once for all."""
    results = multiply_together([linear.kernel for linear in linears], x)
    return [linear.finish(y, x) for linear, y in zip(linears, results, strict=True)]
