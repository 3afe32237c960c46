"""What the bytes of EXL2, GPTQ and dense matrices mean. Knows no kernels, models or devices."""

from collections.abc import Mapping

from torch import Tensor

from .base import LinearShape, QuantFormat
from .dense import Dense
from .detect import detect, load_linear
from .exl2 import Exl2
from .gptq import Gptq
from .hints import FormatHints, GptqHints

__all__ = [
    "Dense",
    "Exl2",
    "FormatHints",
    "Gptq",
    "GptqHints",
    "LinearShape",
    "QuantFormat",
    "dequantize",
    "detect",
    "load_linear",
]


def dequantize(tensors: Mapping[str, Tensor], quantization: Mapping[str, object] | None = None) -> Tensor:
    """Weights (in_features, out_features) float32 of one matrix, its shape taken from the tensors themselves.

    tensors       suffix -> tensor, for example {"q_weight": ..., "q_scale": ...}; further ones are ignored
    quantization  the checkpoint's `quantization_config` as parsed JSON; matters for GPTQ zero-points only
    EXL2 padding columns are part of the result, as the tensors do not tell them from real ones.
    """
    where = "matrix"
    shape = detect(tensors, where=where).infer_shape(tensors, where=where)
    return load_linear(tensors, shape, where=where, hints=FormatHints.from_json(quantization)).dequantize()
