"""Unquantized matrices as checkpoints store them. Knows no kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import FormatError
from .base import LinearShape, QuantFormat
from .checks import require_finite, require_shape, show

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALED = "its meaning lies in scales kept elsewhere"


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense(QuantFormat):
    """weight (N, K) in float16, bfloat16 or float32; a float64 tensor is held as float32."""

    name: ClassVar[str] = "dense"
    marker: ClassVar[str] = "weight"

    shape: LinearShape
    weight: Tensor

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: LinearShape, *, where: str = "matrix") -> Self:
        """See the base class. 8-bit floats and integers are refused: without their scales they are not the weights."""
        weight = cls._tensor(tensors, where)
        require_shape(
            weight,
            "weight",
            where,
            shape.out_features,
            shape.in_features,
            because=f"{shape.out_features} output features, {shape.in_features} input features",
        )
        require_finite(weight, "weight", where)
        if weight.dtype == torch.float64:
            weight = weight.float()
            require_finite(weight, "weight (rounded to float32)", where)
        return cls(shape=shape, weight=weight)

    @classmethod
    def infer_shape(cls, tensors: Mapping[str, Tensor], *, where: str) -> LinearShape:
        """The shape that the tensor has by itself."""
        weight = cls._tensor(tensors, where)
        return LinearShape(weight.shape[1], weight.shape[0])

    @staticmethod
    def _tensor(tensors: Mapping[str, Tensor], where: str) -> Tensor:
        if "weight" not in tensors:
            raise FormatError(f"{where}: tensor weight is missing, found {', '.join(sorted(tensors)) or 'nothing'}")
        weight = tensors["weight"]
        if weight.dtype not in FLOATS:
            reason = SCALED if weight.element_size() == 1 else "not a number format of weights"
            raise FormatError(
                f"{where}: weight is {show(weight.dtype)} ({reason}), wanted {', '.join(map(show, FLOATS))}",
                hint="look for the bf16 or fp16 original of the model, or a GPTQ or EXL2 version",
            )
        if weight.dim() != 2:
            raise FormatError(f"{where}: weight has shape {tuple(weight.shape)}, wanted 2 dimensions")
        return weight

    def dequantize(self) -> Tensor:
        """(K, N) float32, the stored values."""
        return self.weight.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def columns(self, start: int, stop: int) -> Self:
        """See the base class; a view."""
        return type(self)(shape=LinearShape(self.shape.in_features, stop - start), weight=self.weight[start:stop])

    def storage_bits(self) -> int:
        """See the base class."""
        return 8 * self.weight.element_size() * self.weight.numel()
