"""Gated activations against transformers' functions and float64."""

import math

import pytest
import torch
from oracles import assert_as_good_as, same_bits

from exl_runtime.errors import UnsupportedModel
from exl_runtime.ops.activation import gated

ORACLES = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}
HF_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


@pytest.mark.parametrize("activation", ORACLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_float64(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    gate, up = (torch.randn(6, 101) * 4).to(dtype), torch.randn(6, 101).to(dtype)
    exact = ORACLES[activation](gate.double()) * up.double()
    actual = gated(gate, up, activation)
    assert actual.dtype == dtype
    assert_as_good_as(actual, exact.to(dtype), exact, factor=1.01)


@pytest.mark.parametrize("activation", ORACLES)
def test_equal_to_transformers_in_float32(activation: str) -> None:
    from transformers.activations import ACT2FN

    torch.manual_seed(4)
    gate, up = torch.randn(9, 64) * 4, torch.randn(9, 64)
    assert same_bits(gated(gate, up, activation), ACT2FN[HF_NAMES[activation]](gate) * up)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="swiglu_oai"):
        gated(torch.ones(1), torch.ones(1), "swiglu_oai")
