"""Gated activations in plain torch, any device. Knows no matrices."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedModel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,  # exact, by the error function
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, elementwise; same shape and dtype. float32 inside, rounded once at the end.

    Raises UnsupportedModel for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return (ACTIVATIONS[activation](gate.float()) * up.float()).to(gate.dtype)
