"""RMSNorm: equal to transformers in float32, as good as half precision allows elsewhere."""

import pytest
import torch
from oracles import assert_as_good_as, same_bits

from exl_runtime.ops.norm import rms_norm


def oracle(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("shape", [(1, 64), (7, 53), (3, 4, 32), (0, 16)])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_equal_to_transformers_in_float32(shape: tuple[int, ...], eps: float) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(1)
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    for module, offset in ((LlamaRMSNorm(shape[-1], eps), 0.0), (Gemma2RMSNorm(shape[-1], eps), 1.0)):
        module.weight.data.copy_(weight)
        with torch.no_grad():
            assert same_bits(rms_norm(x, weight, eps, offset), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_against_float64(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(2)
    x, weight = (torch.randn(5, 257) * 20).to(dtype), torch.randn(257)
    actual = rms_norm(x, weight, 1e-5, offset)
    assert actual.dtype == dtype
    exact = oracle(x, weight, 1e-5, offset)
    # One rounding at the end is what half precision allows, and the float32 maths may use up as much again.
    assert_as_good_as(actual, exact.to(dtype), exact, factor=1.01)


def test_half_precision_squares_do_not_overflow() -> None:
    x = torch.full((1, 64), 3000.0).half()
    assert torch.allclose(rms_norm(x, torch.ones(64), 1e-6, 0.0).float(), torch.ones(1, 64))
