"""Matrices that an earlier load of the model has packed: their memory is all there is to them."""

import torch
from torch import Tensor

from ...formats.base import LinearShape, QuantFormat
from ...formats.exl2 import Exl2
from ...formats.gptq import Gptq
from .packed_cpu import PackedCpu
from .packing import Packing


def repacked(format_name: str) -> bool:
    """Whether the CPU kernels of a format repack its matrices."""
    return format_name in (Exl2.name, Gptq.name)


class StoredCpu(PackedCpu):
    """See the base class.

    packed       uint8 (bytes,): what a kernel of this shape held, packed as `packing` says
    input_order  its `input_order`, the int32 numbers as bytes
    The native kernel refuses memory of another layout or size, see ext/binding/linear.cpp.
    """

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """See the base class."""
        return "is made from packed memory, not from a checkpoint's tensors"

    def __init__(self, packed: Tensor, shape: LinearShape, packing: Packing, input_order: Tensor | None = None) -> None:
        super().__init__(packed)
        inputs, outputs = packed[16:32].view(torch.int64).tolist()  # of its header, see ext/cpu/tiles.h
        assert (inputs, outputs) == (shape.in_features, shape.out_features), f"{shape} is stored as {inputs, outputs}"
        self.shape = shape
        self.output_order = packing.outputs
        self.input_order = None if input_order is None else input_order.view(torch.int32)
