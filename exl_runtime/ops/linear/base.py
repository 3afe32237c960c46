"""The interface of a matrix multiplication kernel: one format on one backend, one small file each."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ...formats.base import LinearShape, QuantFormat


class LinearKernel(ABC):
    """y = x @ W for one stored matrix. Built once per layer, called per token.

    Bias, tensor splits and the like are wrappers around a kernel, never branches inside one.
    """

    backend: ClassVar[str]  # "cpu", "cuda" or "reference"
    repacks: ClassVar[bool] = False  # the constructor takes a `packing`
    shape: LinearShape
    # Of a kernel that was packed so (see `Packing`): its input k is the matrix's input input_order[k], its output n the
    # matrix's output output_order[n]. int32 (K,), (N,); None: in order.
    input_order: Tensor | None = None
    output_order: Tensor | None = None

    @classmethod
    @abstractmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """None if it can run `w` on `device`, else why not, in words the user can act on."""

    @abstractmethod
    def __init__(self, w: QuantFormat, device: torch.device) -> None:
        """Copy or repack once, here. Workspace is sized here, never in `__call__`."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), dtype of x."""

    def hurry(self) -> None:
        """Give up some accuracy for speed, for good, where this kernel knows how. Most do not."""
        return

    @property
    @abstractmethod
    def storage_bytes(self) -> int:
        """Bytes of memory the kernel holds for its weights."""
