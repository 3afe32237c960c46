"""Checks every format makes on the tensors of one matrix. Knows no layout."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import FormatError, NonFiniteError

HALF_LIMIT = 65520.0  # magnitudes from here on round to infinity in half precision
DAMAGED = "the file is damaged or was written by an incompatible program; download it again"


def require(tensors: Mapping[str, Tensor], name: str, where: str, dims: int, *dtypes: torch.dtype) -> Tensor:
    """The tensor called `name`, with one of `dtypes` and `dims` dimensions; else FormatError."""
    if name not in tensors:
        raise FormatError(
            f"{where}: tensor {name} is missing, found {', '.join(sorted(tensors)) or 'nothing'}",
            hint="the download is incomplete",
        )
    tensor = tensors[name]
    if tensor.dtype not in dtypes:
        raise FormatError(f"{where}: {name} is {show(tensor.dtype)}, wanted {' or '.join(map(show, dtypes))}")
    if tensor.dim() != dims:
        raise FormatError(f"{where}: {name} has shape {tuple(tensor.shape)}, wanted {dims} dimension{'s' * (dims > 1)}")
    return tensor


def require_shape(tensor: Tensor, name: str, where: str, *wanted: int, because: str) -> None:
    """FormatError unless `tensor` has the shape `wanted`; `because` says where that follows from."""
    if tuple(tensor.shape) != wanted:
        raise FormatError(f"{where}: {name} has shape {tuple(tensor.shape)}, wanted {wanted} ({because})", hint=DAMAGED)


def require_finite(tensor: Tensor, name: str, where: str) -> float:
    """The largest magnitude in a float tensor; NonFiniteError if it holds NaN or infinity.

    One pass, no temporary: both bounds inherit a NaN.
    """
    if not tensor.numel():
        return 0.0
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = (~tensor.isfinite()).nonzero()[0].tolist()
        raise NonFiniteError(f"{where}: {name}{bad} is {tensor[tuple(bad)].item()}", hint=DAMAGED)
    return max(-low, high)


def show(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")
