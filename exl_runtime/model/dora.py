"""Weight norms for DoRA, of matrices that nobody can read any more: packed ones are asked for their rows.

DoRA (Liu et al. 2024, arXiv 2402.09353) makes a module's matrix m * (W + D) / |W + D|, output by output, with
D = scale B A and the norm a constant. In terms of y = W x: y + (m / n - 1) y + (m / n) D x, n the norms below.
"""

from copy import copy

import torch
from torch import Tensor

from ..ops.linear.base import LinearKernel
from ..ops.linear.packed_cpu import PackedCpu
from ..ops.linear.tiles import Residual

ROWS = 256  # inputs at a time: with 32768 outputs 64 MB in float64


def weight_norms(kernel: LinearKernel, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """float64 (out_features,): the norm of every row of W + scale * up @ down, on the device of `up`.

    kernel  W, as the model multiplies with it: unit vectors come out as its rows, exact but for a rounding
    down (rank, in), up (rank's out, rank), both in the order of the kernel. The model is never expanded.
    """
    inputs, outputs = kernel.shape.in_features, kernel.shape.out_features
    if isinstance(kernel, PackedCpu):  # a unit vector is exact in 8 bits: without its residual it takes half the time
        kernel = copy(kernel)
        kernel.residual = int(Residual.NEVER)
    total = torch.zeros(outputs, dtype=torch.float64, device=up.device)
    wide, high = up.double() * scale, down.double()
    for start in range(0, inputs, ROWS):
        count = min(ROWS, inputs - start)
        units = torch.zeros(count, inputs, device=up.device)
        units[:, start : start + count].fill_diagonal_(1.0)
        rows = kernel(units).double()
        total += rows.addmm_(high[:, start : start + count].t(), wide.t()).square_().sum(0)
    return total.sqrt_()


def table_norms(table: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`weight_norms` for an embedding: float64 (hidden,), over all tokens. down (rank, vocab), up (hidden, rank)."""
    total = torch.zeros(up.shape[0], dtype=torch.float64, device=table.device)
    for start in range(0, down.shape[1], ROWS):
        stop = start + ROWS
        added = down[:, start:stop].double().t() @ (up.double().t() * scale)
        total += (table[start : start + added.shape[0]].double() + added).square_().sum(0)
    return total.sqrt_()
