"""Second moments of what goes into a matrix, and their Cholesky factors. Knows no layouts and no scales.

Notation of the encoder: X (tokens, K) inputs in the source model, Y (tokens, K) inputs in the model quantized so far,
H = Y^T Y / tokens ("Hessian" in GPTQ, Frantar et al. 2023, up to a factor that changes nothing).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

WIDE = 16384  # from this K on sums are kept in float32: a float64 matrix would take more than 2 GiB
DAMPING_STEPS = 10
FLOOR = 1e-5  # exllamav2's least damping (formats/exl2.md 6.2)


class Moments:
    """Sums over tokens; products in float32, sums in float64 (`WIDE`: float32)."""

    def __init__(self, inputs: int, device: torch.device, *, outputs: int | None = None) -> None:
        """outputs: also collect Y^T R (K, outputs), R (tokens, outputs) the error of the residual stream."""
        self.tokens = 0
        dtype = torch.float64 if inputs < WIDE and device.type != "mps" else torch.float32
        self._h = torch.zeros(inputs, inputs, dtype=dtype, device=device)
        self._shift = torch.zeros_like(self._h)
        self._residual = None if outputs is None else torch.zeros(inputs, outputs, dtype=dtype, device=device)

    def add(self, y: Tensor, x: Tensor | None = None, residual: Tensor | None = None) -> None:
        """y, x (..., K), residual (..., N), all float32; x None: the source sees the same inputs."""
        y = y.reshape(-1, y.shape[-1])
        self.tokens += y.shape[0]
        self._h += y.t() @ y
        if x is not None:
            self._shift += y.t() @ (x.reshape(y.shape) - y)
        if residual is not None:
            self._residual += y.t() @ residual.reshape(y.shape[0], -1)

    @property
    def has_residual(self) -> bool:
        """Whether Y^T R is collected."""
        return self._residual is not None

    @property
    def hessian(self) -> Tensor:
        """H float32 (K, K)."""
        return (self._h / max(1, self.tokens)).float()

    def target(self, weight: Tensor, *, strength: float = 1.0, damping: float = 0.02) -> Tensor:
        """The matrix W' that makes Y W' closest to X W plus the residual error, least squares (encoder.md 3).

        W' = W + strength (H + damping mean(diag H))^-1 Y^T ((X - Y) W + R) / tokens
        weight W and W' float32 (K, N). `weight` itself where H cannot be factored, or infinities came in.
        """
        scale = 1.0 / max(1, self.tokens)
        wanted = (self._shift.float() @ weight) * scale
        if self._residual is not None:
            wanted += self._residual.float() * scale
        h = self._h * scale
        h.diagonal().add_(damping * float(h.diagonal().mean()) + 1e-30)
        lower, failed = torch.linalg.cholesky_ex(h)
        if int(failed):
            return weight
        aimed = weight + strength * torch.cholesky_solve(wanted.to(lower.dtype), lower).float()
        return aimed if bool(torch.isfinite(aimed).all()) else weight


@dataclass(frozen=True, slots=True)
class Factor:
    """The factors of one matrix's H in stored row order.

    perm     int64 (K,): model row of every stored row, falling diag(H), equal ones in the model's order
    h        float32 (K, K): H in that order, undamped
    u        float32 (K, K) upper: U^T U = (H + damping)^-1; None: H could not be factored, round to nearest
    damping  what was added to the diagonal, relative to its mean
    """

    perm: Tensor
    h: Tensor
    u: Tensor | None
    damping: float


def factor(hessian: Tensor, *, damping: float, floor: float = 0.0, order: bool = True) -> Factor:
    """Sort, damp and factor H float32 (K, K).

    The damping grows until both Cholesky factorisations succeed in float64 (formats/exl2.md 6.2: cumulative, at most
    ten attempts); then u is None. Non-finite H, and one that is zero, are not factored at all.

    damping  of the first attempt and what each further one adds, relative to mean(diag H);  floor: its least, absolute
    order    False: keep the model's row order
    """
    diagonal = hessian.diagonal()
    usable = bool(torch.isfinite(diagonal).all()) and float(diagonal.sum()) > 0
    perm = torch.arange(hessian.shape[0], device=hessian.device)
    if order and usable:
        perm = torch.argsort(diagonal, descending=True, stable=True)
    h = hessian[perm][:, perm] if order else hessian
    if not usable:
        return Factor(perm, h, None, float("inf"))
    mean = float(diagonal.double().mean())
    wide = h.to(torch.float64, copy=True)
    total, step = 0.0, max(damping * mean, floor)
    for _ in range(DAMPING_STEPS):
        wide.diagonal().add_(step)
        total += step
        if (u := inverse_upper(wide)) is not None:
            return Factor(perm, h, u.float(), total / mean)
    return Factor(perm, h, None, float("inf"))


def inverse_upper(h: Tensor) -> Tensor | None:
    """Upper U with U^T U = H^-1, in the dtype of h; None when h is not positive definite to its precision.

    Row r of U / u_rr is what GPTQ distributes an error of row r by; u_rr^2 is the variance left in row r when the
    rows behind it are free.
    """
    lower, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not torch.isfinite(upper).all() else upper
