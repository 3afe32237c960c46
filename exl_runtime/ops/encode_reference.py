"""`ops.encode` in plain torch, any device: the definition that the kernels are measured against."""

import torch
from torch import Tensor

PIECE = 1 << 22  # elements of a temporary of `scale_search`
BLOCK = 32  # rows that see each other one by one; those behind get their share as one matrix product


def code_of(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """clamp(w / scale, nearest, ties to even) as whole float32 numbers; 0 where the scale is 0. Broadcasts."""
    code = torch.round(w / torch.where(scale > 0, scale, torch.inf))
    return code.clamp_(-(1 << (bits - 1)), (1 << (bits - 1)) - 1).add_(0.0)  # -0 becomes 0


def value_of(code: Tensor, scale: Tensor) -> Tensor:
    """half(code * scale) as float32. The product is exact before its one rounding: 8 bits times 11."""
    return (code * scale).half().float()


def scale_search(w: Tensor, row_weights: Tensor, group_scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """See `ops.encode.scale_search`."""
    count, columns = group_scales.shape[0], w.shape[1]
    codes = torch.empty(count, columns, dtype=torch.uint8, device=w.device)
    loss = torch.empty(count, columns, dtype=w.dtype, device=w.device)
    squares = torch.arange(1, 17, dtype=w.dtype, device=w.device).square()
    step = max(1, PIECE // (16 * max(1, w.shape[0])))
    for i in range(count):
        scales = (squares * group_scales[i]).half().float()[:, None, None]
        for start in range(0, columns, step):
            piece = slice(start, min(start + step, columns))
            error = value_of(code_of(w[:, piece], scales, bits), scales) - w[:, piece]
            costs = _finite_or_infinity((error.square_() * row_weights[:, None]).sum(1))
            best = costs.argmin(0)
            codes[i, piece] = (best + 1).to(torch.uint8)
            loss[i, piece] = costs.gather(0, best[None])[0]
    return codes, loss


def feedback_loss(w: Tensor, u: Tensor, scales: Tensor, bits: int) -> Tensor:
    """See `ops.encode.feedback_loss`."""
    _, _, errors = _feedback(w.expand(scales.shape[0], *w.shape), u, scales, bits)
    return _finite_or_infinity(errors.square().sum(-2))


def feedback_encode(w: Tensor, u: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.encode.feedback_encode`."""
    codes, q, errors = _feedback(w, u, scales, bits)
    return codes.to(torch.int8), q, errors


def descend(q: Tensor, gradient: Tensor, h: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.encode.descend`."""
    gradient, codes, new_q, delta = gradient.clone(), torch.empty_like(q), q.clone(), torch.zeros_like(q)
    curvature = h.diagonal().tolist()
    for first, end in _blocks(q.shape[0]):
        for r in range(first, end):
            if curvature[r] > 0:
                codes[r] = code_of(q[r] + gradient[r] / h[r, r], scales, bits)
                new_q[r] = value_of(codes[r], scales)
                delta[r] = q[r] - new_q[r]
                gradient[r + 1 : end].addcmul_(h[r, r + 1 : end, None], delta[r])
            else:
                codes[r] = code_of(q[r], scales, bits)
        gradient[end:] += h[first:end, end:].t() @ delta[first:end]
    return codes.to(torch.int8), new_q, delta


def _feedback(w: Tensor, u: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, values and errors (..., R, N) of w (..., R, N) at scales (..., N)."""
    w = w.clone(memory_format=torch.contiguous_format)
    codes, q, errors = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w)
    for first, end in _blocks(w.shape[-2]):
        for r in range(first, end):
            row = w[..., r, :]
            codes[..., r, :] = code_of(row, scales, bits)
            q[..., r, :] = value_of(codes[..., r, :], scales)
            errors[..., r, :] = (row - q[..., r, :]) / u[r, r]
            w[..., r + 1 : end, :].addcmul_(u[r, r + 1 : end, None], errors[..., r : r + 1, :], value=-1)
        w[..., end:, :] -= u[first:end, end:].t() @ errors[..., first:end, :]
    return codes, q, errors


def _blocks(rows: int) -> list[tuple[int, int]]:
    return [(first, min(first + BLOCK, rows)) for first in range(0, rows, BLOCK)]


def _finite_or_infinity(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.inf)
