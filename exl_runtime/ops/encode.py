"""The inner loops of the EXL2 quantizer, one group of rows at a time: native on CPU float32, else in plain torch.

A group is R rows (input features, in the order they are quantized) by N columns (outputs); columns are independent.
Its weights have b = `bits` in {2, 3, 4, 5, 6, 8}, codes c in -2^(b-1) .. 2^(b-1) - 1, and a scale S >= 0 per column,
float32 holding a half (formats/exl2.md 4). Two definitions serve all functions here:

    code of w at S    c = clamp(w / S rounded to the nearest integer, ties to even), a float32 division; 0 where S is 0
    value of c at S   q = half(c * S) widened again: one rounding, subnormals kept, never -0

Everything is float32 and finite on one device; inputs are never modified. The native kernels raise RuntimeError for
shapes, dtypes or widths that do not fit. They add in a fixed order: results do not depend on threads or on N.
Native and reference differ in last bits of sums, so now and then in a code that lies between two.
"""

import torch
from torch import Tensor

from . import encode_reference as reference
from . import native


def scale_search(w: Tensor, row_weights: Tensor, group_scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The best scale code of every column for every candidate of the group's scale, without error feedback.

    w             (R, N)
    row_weights   (R,), not negative: what a squared error in that row costs
    group_scales  (M,), candidates for half(q_scale_max / 256), each float32 holding a half
    Returns codes uint8 (M, N), s in 1 .. 16, and loss float32 (M, N): S = half(s * s * m) has the least
    sum_r row_weights[r] * (w[r] - q[r])^2, the smallest s among equals. Scales that overflow half precision lose
    to all others; where all do, s is 1 and the loss infinity.
    """
    if _native(w):
        return native.ops().scale_search(*_whole(w, row_weights, group_scales), bits)
    return reference.scale_search(w, row_weights, group_scales, bits)


def feedback_loss(w: Tensor, u: Tensor, scales: Tensor, bits: int) -> Tensor:
    """What each candidate scale of a column costs when its group is quantized with error feedback (GPTQ, 2022).

    w       (R, N)
    u       (R, R), the group's block of the upper Cholesky factor of the inverse Hessian: diagonal > 0, and what lies
            below the diagonal is not read
    scales  (C, N), candidates
    Returns float32 (C, N): sum_r e[r]^2, where row after row e[r] = (w[r] - q[r]) / u[r, r] and
    w[i] -= u[r, i] * e[r] for i > r; infinity where a value overflows half precision.
    """
    if _native(w):
        return native.ops().feedback_loss(*_whole(w, u, scales), bits)
    return reference.feedback_loss(w, u, scales, bits)


def feedback_best(w: Tensor, u: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The cheapest of C candidates by `feedback_loss`: int64 (N,), the first among equals, and its loss float32 (N,).

    Raises ValueError without candidates.
    """
    if not scales.shape[0]:
        raise ValueError("there are no candidate scales to choose from")
    loss = feedback_loss(w, u, scales, bits)
    best = loss.argmin(0)
    return best, loss.gather(0, best[None])[0]


def feedback_encode(w: Tensor, u: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a group with error feedback, see `feedback_loss`, with one scale per column.

    w (R, N), u (R, R), scales (N,)
    Returns codes int8 (R, N), q float32 (R, N), and errors float32 (R, N), the e[r]: the rows behind the group are to
    lose u[group, behind]^T @ errors.
    """
    if _native(w):
        return native.ops().feedback_encode(*_whole(w, u, scales), bits)
    return reference.feedback_encode(w, u, scales, bits)


def descend(q: Tensor, gradient: Tensor, h: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """One sweep of coordinate descent over the rows of a group on tr((W - Q)^T H (W - Q)).

    q         (R, N), the values of the group before
    gradient  (R, N), the group's rows of H @ (W - Q)
    h         (R, R), the group's diagonal block of the symmetric H; only its upper triangle is read
    scales    (N,)
    Row after row: the code of q[r] + gradient[r] / h[r, r] gives the new q[r], delta[r] = old q[r] - new q[r], and
    gradient[i] += h[r, i] * delta[r] for i > r. Rows with h[r, r] <= 0 keep their value; their code is that of q[r].
    Returns codes int8, q and delta float32, all (R, N). For the next sweep, H @ (W - Q) grows by H[:, group] @ delta.
    """
    if _native(q):
        return native.ops().descend(*_whole(q, gradient, h, scales), bits)
    return reference.descend(q, gradient, h, scales, bits)


def _native(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return native.resolve_backend(None, x.device) == "cpu"


def _whole(*tensors: Tensor) -> list[Tensor]:
    """Contiguous: blocks of a factor and strips of a matrix come as views."""
    return [tensor.contiguous() for tensor in tensors]
