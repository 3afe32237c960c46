"""Are the weights sound? Every tensor is read once before hours of work begin, and the first bad one is named."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from exl_runtime.errors import NonFiniteError

from .encoded import HALF_MAX
from .source import Source


def check_weights(source: Source, advance: Callable[[], None] = lambda: None) -> None:
    """Read the whole model, one layer at a time; `advance` is called after each.

    Raises NonFiniteError for NaN, infinity and what half precision cannot hold, and what reading raises for tensors
    that are missing or do not fit.
    """
    for layer in source.spec.layers:
        for name, tensor in _layer(source, layer.index):
            require_half(tensor, name, source)
        advance()
    names = {key: name for name, key in source.dense_tensors(None).items()}
    require_half(source.embedding(), names["embedding"], source)
    require_half(source.final_norm(), names["final_norm"], source)
    if not source.head_is_embedding:
        require_half(source.head(), f"{source.head_slot.path}.weight", source)
    for name in source.extra_tensors():
        tensor = source.extra(name)
        if tensor.dtype.is_floating_point:
            require_half(tensor, name, source)


def require_half(tensor: Tensor, name: str, source: Source) -> None:
    """NonFiniteError unless every value of `tensor`, any float dtype, is finite in half precision."""
    low, high = (float(bound) for bound in torch.aminmax(tensor.float())) if tensor.numel() else (0.0, 0.0)
    if not max(-low, high) <= HALF_MAX:  # NaN included
        raise NonFiniteError(
            f"{source.folder}: {name} holds {low if -low > high else high:g}; EXL2 stores half precision, at most "
            f"{HALF_MAX:g}",
            hint="the weights are damaged, or this model cannot be stored as EXL2",
        )


def half(tensor: Tensor, name: str) -> Tensor:
    """Rounded to half precision; NonFiniteError when it does not fit."""
    rounded = tensor.half()
    if not torch.isfinite(rounded).all():
        raise NonFiniteError(f"{name}: has values beyond half precision, which is all EXL2 can store (largest 65504)")
    return rounded


def _layer(source: Source, index: int) -> Iterator[tuple[str, Tensor]]:
    names = {f"{slot.key}": f"{slot.path}.weight" for slot in source.slots(index)}
    names |= {f"{slot.key}.bias": f"{slot.path}.bias" for slot in source.slots(index)}
    names |= {key: name for name, key in source.dense_tensors(index).items()}
    for key, tensor in source.layer(index).items():
        yield names[key], tensor
