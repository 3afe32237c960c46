"""The interface of a checkpoint format: how the tensors of one matrix are named, and what they mean."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class LinearShape:
    """The shape the model expects: y (out_features) = x (in_features) @ W (in_features, out_features)."""

    in_features: int
    out_features: int


class QuantFormat(ABC):
    """The weights of one linear layer in one format. Holds tensors as stored; never edits its input.

    Bias is not part of it: the loader adds it around the kernel.
    """

    name: ClassVar[str]  # "exl2", "gptq", "dense"
    marker: ClassVar[str]  # the tensor suffix that only this format has
    shape: LinearShape

    @classmethod
    @abstractmethod
    def load(cls, tensors: Mapping[str, Tensor], shape: LinearShape, *, where: str = "matrix") -> Self:
        """Check dtypes, shapes and values of `tensors` (suffix -> tensor, e.g. "q_weight").

        `where` names the matrix and its file for messages. Raises FormatError / NonFiniteError naming the tensor.
        """

    @abstractmethod
    def dequantize(self) -> Tensor:
        """(in_features, out_features) float32, rows in the model's order. This defines the format."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> Self:
        """The same format restricted to output features [start, stop): a part of a fused projection."""

    @abstractmethod
    def storage_bits(self) -> int:
        """Bits this matrix occupies on disk, scales, zero-points, permutation and padding included."""
