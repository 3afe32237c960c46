"""Quantized matrices on a CUDA card, once packed: codes stay packed and are decoded in registers."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .. import native
from .base import LinearKernel
from .tiles_cuda import COLUMNS, MOST_OUTPUTS, CudaMatrix
from .workspace_cuda import MOST_ROWS, Workspace, workspace

MOST_TOGETHER = 8  # matrices in one launch, ext/cuda/skinny.h
GATES = ("silu", "gelu", "gelu_tanh", "relu")  # of one launch, in the order of ext/cuda/skinny.h
FACTOR_AT = 15.0  # binary logarithm: rows larger than 2^15 are scaled down before they become half


class Plan:
    """One launch: matrices that take the same input, and how their work is cut."""

    def __init__(
        self,
        matrices: Sequence[CudaMatrix],
        space: Workspace,
        *,
        biases: Sequence[Tensor] = (),
        gate: str | None = None,
    ) -> None:
        first = matrices[0]
        self._space = space
        self._ops = native.cuda_ops(space.device)
        self._keep = (tuple(matrices), tuple(biases))
        segments, starts, slots = space.cuts([(w.outputs, w.lines) for w in matrices], gated=gate is not None)
        self._tables = (segments, starts, space.partials, space.tickets)
        self._blob = self._ops.linear_plan(
            [w.blob for w in matrices],
            list(biases),
            first.rows,
            first.inputs,
            segments,
            starts,
            slots,
            space.partials,
            space.tickets,
            0 if gate is None else GATES.index(gate) + 1,
        )

    def __call__(self, x: Tensor, *, wide: bool = False, stream: Tensor | None = None) -> list[Tensor]:
        """x (m, inputs) with m <= MOST_ROWS times every matrix; see linear_multiply in ext/binding/cuda/linear.cpp."""
        space = self._space
        return self._ops.linear_multiply(x, self._blob, space.staged, space.factors, wide, stream)

    @property
    def nbytes(self) -> int:
        """Bytes on the card, without the matrices and what all plans share."""
        segments, starts = self._tables[:2]
        return sum(t.nbytes for t in (*segments, *starts))


class PackedCuda(LinearKernel):
    """What the kernels of all packed formats share; see ext/cuda/skinny.h.

    x float16, bfloat16 or float32. Inputs are multiplied as float16: rows of other types are scaled by a power of two
    so that their largest number fits, and keep 11 bits of every number down to 2^-28 of that. Up to 32 rows at once, a
    row's result is the same bits in any batch.
    """

    backend: ClassVar[str] = "cuda"

    def __init__(self, matrix: CudaMatrix, device: torch.device) -> None:
        self.matrix = matrix
        self._space = workspace(device)
        self._space.reserve((len(matrix.lines) - 1) * COLUMNS, matrix.inputs)
        self._plan = Plan([matrix], self._space)
        self._together: dict[tuple[int | str, ...], Plan | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """See the base class."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if flat.shape[0] <= MOST_ROWS:
            y = self._plan(flat)[0]
        else:
            y = self.by_library(flat, x.dtype)
        return y.view(*x.shape[:-1], self.matrix.outputs)

    def float32(self, x: Tensor) -> Tensor:
        """The product in float32, whatever the dtype of x: for logits."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if flat.shape[0] <= MOST_ROWS:
            y = self._plan(flat, wide=True)[0]
        else:
            y = self.by_library(flat, torch.float32)
        return y.view(*x.shape[:-1], self.matrix.outputs)

    def add_to(self, stream: Tensor, x: Tensor) -> Tensor:
        """stream += x @ W in one go, without rounding the product. stream float32 (m, out_features), contiguous."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if flat.shape[0] <= MOST_ROWS:
            self._plan(flat, stream=stream)
            return stream
        return stream.add_(self.by_library(flat, torch.float32))

    @property
    def storage_bytes(self) -> int:
        """See the base class."""
        return self.matrix.nbytes + self._plan.nbytes

    def by_library(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (m, K) -> (m, N) of `dtype`. For many rows: weights in halves, panel by panel, and torch's product."""
        w, space = self.matrix, self._space
        ops = native.cuda_ops(space.device)
        x, factor = into_half(x)
        columns = -(-w.outputs // COLUMNS)
        wide = max(1, min(columns, space.panel.numel() // (max(w.inputs, 1) * COLUMNS)))
        y = x.new_empty(x.shape[0], w.outputs, dtype=dtype)
        for column in range(0, columns, wide):
            count = min(wide, columns - column)
            panel = space.panel[: w.inputs * count * COLUMNS].view(w.inputs, count * COLUMNS)
            ops.linear_dequant(w.blob, w.rows, column, count, panel)
            start, stop = column * COLUMNS, min((column + count) * COLUMNS, w.outputs)
            product = multiply_half(x, panel[:, : stop - start])
            y[:, start:stop] = product if factor is None else product.mul_(factor)
        return y


def into_half(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(x in float16, factors float32 (m, 1) with x = half * factor); None: all ones.

    A row gets a power of two that brings its largest number to 2^14 .. 2^15, as in ext/cuda/skinny_stage.h.
    """
    if x.dtype == torch.float16:
        return x, None
    wide = x.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    usable = torch.isfinite(largest) & (largest > 0)
    exponent = torch.frexp(torch.where(usable, largest, 1.0))[1]
    shift = torch.where(usable, (FACTOR_AT - exponent).clamp(-120, 120), 0).to(torch.float32)
    return (wide * torch.exp2(shift)).half(), torch.exp2(-shift)


def multiply_half(x: Tensor, weight: Tensor) -> Tensor:
    """x (m, K) @ weight (K, N), float16, summed in float32, as float32 (m, N)."""
    if x.device.type == "cuda":
        return torch.mm(x, weight, out_dtype=torch.float32)
    return x.float() @ weight.float()


def multiply_together(kernels: Sequence[LinearKernel], x: Tensor) -> list[Tensor] | None:
    """[kernel(x) for kernel in kernels] by one launch; None where these kernels cannot be joined.

    The work of all is cut as one, so rounding may differ from that of single calls; it is the same for any batch of up
    to 32 rows.
    """
    first = kernels[0]
    if not isinstance(first, PackedCuda) or len(kernels) > MOST_TOGETHER or x.shape[:-1].numel() > MOST_ROWS:
        return None
    key = tuple(id(kernel) for kernel in kernels)
    if key not in first._together:
        first._together[key] = _join(kernels)
    plan = first._together[key]
    if plan is None:
        return None
    results = plan(x.reshape(-1, x.shape[-1]).contiguous())
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]


def gated_together(
    gate: LinearKernel, up: LinearKernel, x: Tensor, activation: str, *, wide: bool = False
) -> Tensor | None:
    """activation(gate(x)) * up(x) by one launch, float32 throughout, or None where these kernels cannot be joined.

    x (..., K) -> (..., N), dtype of x, or float32 if `wide`: products outgrow half precision in models that were made
    for bfloat16. The same bits for any batch of up to 32 rows.
    """
    if not isinstance(gate, PackedCuda) or activation not in GATES or x.shape[:-1].numel() > MOST_ROWS:
        return None
    key = (id(gate), id(up), activation)
    if key not in gate._together:
        gate._together[key] = _join((gate, up), activation)
    plan = gate._together[key]
    if plan is None:
        return None
    y = plan(x.reshape(-1, x.shape[-1]).contiguous(), wide=wide)[0]
    return y.view(*x.shape[:-1], y.shape[-1])


def _join(kernels: Sequence[LinearKernel], gate: str | None = None) -> Plan | None:
    """The plan for all, if they are on one card and take their inputs in the same order."""
    packed = [kernel for kernel in kernels if isinstance(kernel, PackedCuda)]
    first = packed[0]
    if len(packed) != len(kernels):
        return None
    for kernel in packed[1:]:
        if kernel._space is not first._space or kernel.matrix.inputs != first.matrix.inputs:
            return None
        if len(kernel.matrix.lines) != len(first.matrix.lines) or not _same(kernel.matrix.rows, first.matrix.rows):
            return None
        if gate is not None and kernel.matrix.outputs != first.matrix.outputs:
            return None
    return Plan([kernel.matrix for kernel in packed], first._space, gate=gate)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def packed_refusal(outputs: int, device: torch.device) -> str | None:
    """Why no packed CUDA kernel can run on `device`, or None."""
    if outputs > MOST_OUTPUTS:
        return f"takes at most {MOST_OUTPUTS} output features, this matrix has {outputs}"
    return native.cuda_refusal(device)
