"""Rotary position embedding: frequencies, angles, rotation, in plain torch. Knows no configs and no sequences.

Trained models expect the very float32 values that transformers computes, so the order of operations below follows
them; reordering a product shifts late positions by visible amounts. Kinds: linear scaling, dynamic NTK, YaRN
(arXiv 2309.00071), the smoothed three-band rule "llama3", LongRoPE (arXiv 2402.13753).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedModel

FAR = 1 << 20  # positions


def frequencies(
    *,
    kind: str,
    theta: float,
    rotary_dim: int,
    factor: float = 1.0,
    original_context: int = 0,
    length: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    short_factor: Sequence[float] = (),
    long_factor: Sequence[float] = (),
) -> Tensor:
    """Radians per position of every rotated pair, float32 (rotary_dim / 2,), on the CPU.

    kind    "default" | "linear" | "dynamic" | "yarn" | "llama3" | "longrope"
    length  tokens the sequence is planned to reach: selects dynamic's base and longrope's factors; 0 or at most
            original_context means the trained range
    The others are explained at `RopeSpec`. Raises UnsupportedModel for an unknown kind.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    if kind == "default":
        return 1.0 / (theta**exponents)
    if kind == "linear":
        return 1.0 / (theta**exponents) / factor
    if kind == "dynamic":
        return 1.0 / (_dynamic_base(theta, rotary_dim, factor, original_context, length) ** exponents)
    if kind == "yarn":
        low, high = _yarn_range(theta, rotary_dim, original_context, beta_fast, beta_slow, truncate)
        return _yarn(theta**exponents, factor, low, high)
    if kind == "llama3":
        return _three_bands(1.0 / (theta**exponents), factor, original_context, low_freq_factor, high_freq_factor)
    if kind == "longrope":
        stretch = long_factor if length > original_context else short_factor
        return 1.0 / (torch.tensor(stretch, dtype=torch.float32) * theta**exponents)
    raise UnsupportedModel(f"rope kind {kind!r} is not one of default, linear, dynamic, yarn, llama3, longrope")


def cos_sin(inv_freq: Tensor, positions: Tensor, attention_factor: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, times attention_factor.

    inv_freq float32 (rotary_dim / 2,), positions int64 (T,) -> two float32 (T, rotary_dim / 2).
    Angles of positions from FAR on, where no trained model has its own values, are rounded after whole turns are gone:
    a window that rolls on for millions of tokens keeps telling neighbours apart.
    """
    angles = positions[:, None].float() * inv_freq
    if positions.device.type != "cpu" or (positions >= FAR).any():  # a device is not asked, that would hold it up
        exact = (positions[:, None].double() * inv_freq.double()).remainder(2 * math.pi).float()
        angles = torch.where((positions < FAR)[:, None], angles, exact)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; dimension i of a head pairs with i + rotary_dim / 2, the rest passes through.

    q (T, heads, head_dim), k (T, kv_heads, head_dim); cos, sin float32 (T, rotary_dim / 2).
    Returns new tensors in the dtypes of q and k; float32 inside.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], dim=-1)


def _dynamic_base(theta: float, rotary_dim: int, factor: float, original_context: int, length: int) -> float | Tensor:
    """theta grown so that `length` tokens fit the trained angles (NTK-aware scaling)."""
    power = rotary_dim / (rotary_dim - 2)
    if length <= original_context:
        # Python floats: what a model computes when it is built.
        return theta * ((factor * original_context / original_context) - (factor - 1)) ** power
    # A tensor: what a model computes in a forward pass, in float32 throughout.
    grown = torch.tensor(length)
    return theta * ((factor * grown / original_context) - (factor - 1)) ** power


def _yarn_range(
    theta: float, rotary_dim: int, original_context: int, beta_fast: float, beta_slow: float, truncate: bool
) -> tuple[float, float]:
    """Pair indices between which YaRN blends: those that turn beta_fast and beta_slow times in the trained context."""

    def index(turns: float) -> float:
        return (rotary_dim * math.log(original_context / (turns * 2 * math.pi))) / (2 * math.log(theta))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    return low, high + 0.001 if low == high else high  # a ramp needs some width


def _yarn(wavelengths: Tensor, factor: float, low: float, high: float) -> Tensor:
    """Fast pairs keep their frequency, slow ones are divided by factor, a linear ramp between."""
    ramp = torch.clamp((torch.arange(wavelengths.numel(), dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return 1.0 / (factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _three_bands(
    inv_freq: Tensor, factor: float, original_context: int, low_freq_factor: float, high_freq_factor: float
) -> Tensor:
    """Short wavelengths stay, long ones are divided by factor, the band between is blended."""
    wavelength = 2 * math.pi / inv_freq
    longest, shortest = original_context / low_freq_factor, original_context / high_freq_factor
    scaled = torch.where(wavelength > longest, inv_freq / factor, inv_freq)
    smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    between = (wavelength >= shortest) & (wavelength <= longest)
    return torch.where(between, blended, scaled)
