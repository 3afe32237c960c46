"""Quantized matrices on the CPU, once packed: the input in 8-bit integers, the codes as they are."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .. import native
from .base import LinearKernel
from .tiles import Residual, Source, flat_float, like_input, pack

MOST_TOGETHER = 8  # matrices in one call of the native kernel


class PackedCpu(LinearKernel):
    """What the kernels of all packed formats share; see ext/cpu/linear_packed.h.

    `residual` may be changed at any time: batches of up to so many rows are computed with the residual.
    """

    backend: ClassVar[str] = "cpu"

    def __init__(self, source: Source | Tensor, residual: int = Residual.ALWAYS) -> None:
        self.residual = int(residual)
        self.packed = source if isinstance(source, Tensor) else pack(source)

    def __call__(self, x: Tensor) -> Tensor:
        """See the base class."""
        return like_input(native.ops().linear_packed(flat_float(x), self.packed, self.residual), x)

    def hurry(self) -> None:
        """See the base class: prompts without the residual; single tokens keep it, where memory is the limit anyway."""
        self.residual = int(Residual.FEW)

    @property
    def storage_bytes(self) -> int:
        """See the base class."""
        return self.packed.nbytes


def multiply_together(kernels: Sequence[LinearKernel], x: Tensor) -> list[Tensor]:
    """[kernel(x) for kernel in kernels], bit for bit, in one go where all are PackedCpu kernels.

    x is quantized once for all matrices that take their inputs in the same order, as the query, key and value
    projections of a layer often do, and the threads are called once.
    """
    first = kernels[0]
    if not isinstance(first, PackedCpu) or len(kernels) > MOST_TOGETHER:
        return [kernel(x) for kernel in kernels]
    for kernel in kernels:
        if not isinstance(kernel, PackedCpu) or kernel.residual != first.residual:
            return [kernel(x) for kernel in kernels]
    packed = [kernel.packed for kernel in kernels if isinstance(kernel, PackedCpu)]
    results = native.ops().linear_packed_many(flat_float(x), packed, first.residual)
    return [like_input(y, x) for y in results]
