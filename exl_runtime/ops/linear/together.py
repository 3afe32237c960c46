"""Several matrices times one input, in one go where their kernels know how."""

from collections.abc import Sequence

from torch import Tensor

from . import packed_cpu, packed_cuda
from .base import LinearKernel


def multiply_together(kernels: Sequence[LinearKernel], x: Tensor) -> list[Tensor]:
    """[kernel(x) for kernel in kernels]: bit for bit on the CPU; on a card rounding may differ, see `packed_cuda`."""
    if isinstance(kernels[0], packed_cuda.PackedCuda):
        results = packed_cuda.multiply_together(kernels, x)
        if results is not None:
            return results
    return packed_cpu.multiply_together(kernels, x)
