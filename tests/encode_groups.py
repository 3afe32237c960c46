"""Groups of weights for the quantizer's inner loops, and float64 oracles that search by trying. No pytest here."""

import numpy as np
import torch
from torch import Tensor

from exl_runtime.ops import encode_reference as reference

EXACT_SCALES = [0.25, 0.0, 2.0**-24, 2.0**-20, 3 * 2.0**-10, 1.0, 2.0**-14, 5 * 2.0**-22]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def half(x: Tensor) -> Tensor:
    return x.half().float()


class Group:
    """Weights, a Hessian with its factor u (H^-1 = u^T u), and plausible scales; the last column has a scale of 0."""

    def __init__(self, rows: int, columns: int, bits: int, seed: int = 0) -> None:
        self.w = 0.02 * random(rows, columns, seed=seed)
        x = random(2 * rows + 8, rows, seed=seed + 1) + random(2 * rows + 8, 1, seed=seed + 2)
        h = (x.t() @ x).double() / x.shape[0] + 0.1 * torch.eye(rows, dtype=torch.float64)
        u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
        self.h, self.u, self.bits = h.float().contiguous(), u.float().contiguous(), bits
        self.row_weights = 1 / self.u.diagonal().square()
        widest = self.w.abs().amax(0) / (2 ** (bits - 1) - 0.5)
        self.group_scales = half(widest.max() * torch.tensor([0.5, 0.8, 1.0, 1.25]) / 256)
        self.candidates = half(widest * torch.tensor([0.4, 0.7, 1.0, 1.2])[:, None])
        self.scales = self.candidates[1].clone()
        if columns > 2:
            self.scales[-1] = 0
        self.round()

    def round(self) -> None:
        """Where a descent starts from: rounded weights, and the gradient there."""
        self.q = reference.value_of(reference.code_of(self.w, self.scales, self.bits), self.scales)
        self.gradient = self.h @ (self.w - self.q)


def every_function(ops: object, g: Group) -> list[Tensor]:
    """All outputs of all functions, for comparisons of whole implementations."""
    return [
        *ops.scale_search(g.w, g.row_weights, g.group_scales, g.bits),
        ops.feedback_loss(g.w, g.u, g.candidates, g.bits),
        *ops.feedback_encode(g.w, g.u, g.scales, g.bits),
        *ops.descend(g.q, g.gradient, g.h, g.scales, g.bits),
    ]


def exact_group(rows: int, bits: int) -> Group:
    """Weights are sixteenths of the scale, so ties abound; u and h are sparse and hold small integers.

    The sums of `scale_search` need smaller numbers: its weights are `quarters`.
    """
    g = Group(rows, 3 * len(EXACT_SCALES), bits)
    pick = torch.Generator().manual_seed(bits)
    g.scales = torch.tensor(3 * EXACT_SCALES)
    limit = 16 * 2 ** (bits - 1) + 16
    sixteenths = torch.randint(-limit, limit + 1, g.w.shape, generator=pick)
    g.w = torch.where(g.scales > 0, sixteenths * g.scales / 16, sixteenths % 4)
    g.quarters = torch.randint(-12, 13, g.w.shape, generator=pick) / 4
    g.u = torch.eye(rows)
    for r in range(0, rows - 7, 3):  # no row that halves feeds another one: that would make ever finer steps
        g.u[r, r] = 2.0
        g.u[r, r + 4], g.u[r, r + 7] = 1.0, -1.0
    g.h = g.u + g.u.triu(1).t()
    g.h[rows // 2, rows // 2] = 0.0
    g.candidates = torch.stack([g.scales, 2 * g.scales, g.scales])
    g.row_weights = torch.arange(rows) % 3.0
    g.group_scales = torch.tensor([2.0**-6, 0.0, 3 * 2.0**-6, 2.0**-5])
    g.round()
    return g


# ---- float64 numpy: what the words of the contract say, one number after another


def grid_of(scale: float, bits: int) -> np.ndarray:
    """All values that a column can hold, code -2^(bits-1) first."""
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    return (codes * np.float64(scale)).astype(np.float16).astype(np.float64)


def slow_code(w: np.ndarray, scale: float, bits: int) -> np.ndarray:
    if scale == 0:
        return np.zeros(w.shape, int)
    return np.clip(np.rint(w / np.float64(scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(int)


def slow_feedback(w: Tensor, u: Tensor, scales: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w, u, scales = w.double().numpy().copy(), u.double().numpy(), scales.double().numpy()
    codes, q, errors = np.zeros(w.shape, int), np.zeros(w.shape), np.zeros(w.shape)
    for n in range(w.shape[1]):
        values = grid_of(scales[n], bits)
        for r in range(w.shape[0]):
            codes[r, n] = slow_code(w[r, n], scales[n], bits)
            q[r, n] = values[codes[r, n] + 2 ** (bits - 1)]
            errors[r, n] = (w[r, n] - q[r, n]) / u[r, r]
            w[r + 1 :, n] -= u[r, r + 1 :] * errors[r, n]
    return codes, q, errors


def slow_descent(w: Tensor, q: Tensor, h: Tensor, scales: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Per row and column the code with the least quadratic form, by trying all of them."""
    w, q, h = w.double().numpy(), q.double().numpy().copy(), h.double().numpy()
    codes = np.zeros(w.shape, int)
    for n in range(w.shape[1]):
        values = grid_of(float(scales[n]), bits)
        for r in range(w.shape[0]):
            errors = np.repeat((w[:, n] - q[:, n])[None], len(values), 0)
            errors[:, r] = w[r, n] - values
            best = int(np.argmin(np.einsum("ki,ij,kj->k", errors, h, errors)))
            codes[r, n], q[r, n] = best - 2 ** (bits - 1), values[best]
    return codes, q


def slow_search(w: Tensor, weights: Tensor, m: float, bits: int) -> tuple[np.ndarray, np.ndarray]:
    w, weights = w.double().numpy(), weights.double().numpy()
    losses = []
    for s in range(1, 17):
        scale = float(np.float16(s * s * np.float64(m)))
        values = grid_of(scale, bits)
        errors = w - values[slow_code(w, scale, bits) + 2 ** (bits - 1)]
        losses.append((weights[:, None] * errors**2).sum(0))
    return np.argmin(losses, 0) + 1, np.min(losses, 0)
