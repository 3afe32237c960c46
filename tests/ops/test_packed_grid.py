"""Every packed kernel against `dequantize` in float64: all widths, groups and remainders of shapes, by the element."""

import pytest
import torch
from matrices import exl2_tensors, gptq_tensors

from exl_runtime.formats import FormatHints, LinearShape, load_linear
from exl_runtime.formats.base import QuantFormat
from exl_runtime.ops.linear import select
from exl_runtime.ops.linear.packed_cpu import PackedCpu
from exl_runtime.ops.linear.tiles import Residual

ROWS = 33


def inputs(count: int) -> torch.Tensor:
    """Gaussian rows; row 3 has an outlier, 5 is zero, 7 a single value."""
    x = torch.randn(ROWS, count, generator=torch.Generator().manual_seed(count))
    x[3, count // 2] *= 1000
    x[5] = x[7] = 0
    x[7, count - 1] = 2.5
    return x


def check(w: QuantFormat) -> None:
    """The rounding of the format, 2^-11 of every product, and of the inputs, each at most the row's largest / 254 or
    / 32512 (ext/cpu/linear_packed.h); and float32's, once a span of 32 or more and three times a product."""
    weight, x = w.dequantize().double(), inputs(w.shape.in_features)
    kernel = select.select(w, torch.device("cpu"), "cpu")
    assert isinstance(kernel, PackedCpu)
    wanted, size = x.double() @ weight, x.double().abs() @ weight.abs()
    for residual, step in ((Residual.ALWAYS, 32512), (Residual.NEVER, 254)):
        kernel.residual = int(residual)
        off = x.double().abs().amax(1, keepdim=True) / step * weight.abs().sum(0)
        bound = off + (2.0**-11 + (w.shape.in_features / 32 + 4) * 2.0**-24) * (size + off) + 2.0**-25
        for rows in (1, 2, 5, 8, 17, ROWS):
            assert ((kernel(x[:rows]).double() - wanted[:rows]).abs() <= bound[:rows]).all(), f"{rows} rows, {residual}"
        assert torch.equal(kernel(x[5:6]), torch.zeros(1, w.shape.out_features))


@pytest.mark.parametrize("outputs", [1, 15, 32, 49])
@pytest.mark.parametrize("group", [32, 64, 128, 160])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_exl2(bits: int, group: int, outputs: int, isa: str) -> None:
    for groups in (1, 3):
        tensors = exl2_tensors([(bits, group)] * groups, outputs, permuted=groups > 1, seed=bits + group)
        check(load_linear(tensors, LinearShape(group * groups, outputs), where="m"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [-1, 32, 64, 128, 24])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, group: int, act_order: bool, symmetric: bool, isa: str) -> None:
    tensors = gptq_tensors(bits, 288, 32, group, act_order=act_order, seed=bits + group)
    declared = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric}
    w = load_linear(tensors, LinearShape(288, 32), where="m", hints=FormatHints.from_json(declared))
    if symmetric:
        w.zeros.fill_(1 << (bits - 1))
    check(w)
