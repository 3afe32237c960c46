"""The dense matrix kernels: the accuracy of float32, the same bits in any batch. And what any CPU kernel refuses."""

import pytest
import torch
from matrices import dense_tensors, exl2_tensors
from oracles import assert_as_good_as, same_bits

from exl_runtime.formats import LinearShape, load_linear
from exl_runtime.formats.base import QuantFormat
from exl_runtime.ops import native
from exl_runtime.ops.linear import select
from exl_runtime.ops.linear.dense_cpu import DenseCpu
from exl_runtime.ops.linear.exl2_cpu import Exl2Cpu
from exl_runtime.ops.linear.gptq_cpu import GptqCpu

CPU = torch.device("cpu")
ROWS = [0, 1, 2, 3, 4, 5, 8, 13, 17, 64, 96, 97, 100]  # about 96 and 12: the most of the kernels for few rows

pytestmark = pytest.mark.usefixtures("kernels")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(inputs: int, outputs: int, dtype: torch.dtype) -> QuantFormat:
    return load_linear(dense_tensors(inputs, outputs, dtype), LinearShape(inputs, outputs), where="m")


def build(w: QuantFormat) -> DenseCpu:
    kernel = select.select(w, CPU, "cpu")
    assert isinstance(kernel, DenseCpu)
    return kernel


MATRICES = {
    "float16, short": lambda: dense(17, 70, torch.float16),
    "float32, one column": lambda: dense(32, 1, torch.float32),
    "float32": lambda: dense(640, 96, torch.float32),
    "float16, odd": lambda: dense(1037, 7, torch.float16),
    "bfloat16": lambda: dense(96, 160, torch.bfloat16),
    "bfloat16, longer than a line of sums": lambda: dense(16896, 5, torch.bfloat16),
}


@pytest.fixture(params=MATRICES.values(), ids=MATRICES.keys())
def matrix(request: pytest.FixtureRequest) -> QuantFormat:
    return request.param()


def test_as_good_as_float32_and_independent_of_the_batch(matrix: QuantFormat, isa: str) -> None:
    kernel, weight = build(matrix), matrix.dequantize()
    x = random(100, weight.shape[0])
    whole = kernel(x)
    assert_as_good_as(whole, x @ weight, x.double() @ weight.double())
    for rows in ROWS:
        assert same_bits(kernel(x[:rows]), whole[:rows]), f"{rows} rows"
    assert same_bits(kernel(x[41:42]), whole[41:42])
    assert same_bits(kernel(x[50:53]), whole[50:53])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [1, 5, 8, 15, 16, 17, 32, 47, 63, 64, 65])
@pytest.mark.parametrize("outputs", [16, 33, 127])
def test_short_rows_of_weights(inputs: int, outputs: int, dtype: torch.dtype, isa: str) -> None:
    """A kernel of its own for up to 64 inputs and 3 rows; more rows have the sums of all others."""
    w = dense(inputs, outputs, dtype)
    kernel, weight, x = build(w), w.dequantize(), random(11, inputs)
    whole = kernel(x)
    assert_as_good_as(whole, x @ weight, x.double() @ weight.double())
    for rows in (1, 2, 3, 4):
        assert same_bits(kernel(x[:rows]), whole[:rows]), f"{rows} rows"


def test_avx2_equals_avx512(matrix: QuantFormat, restore: None) -> None:
    kernel, results = build(matrix), []
    x = random(31, matrix.shape.in_features)
    for name in ("avx2", "avx512"):
        try:
            native.ops().set_isa(name)
        except RuntimeError as err:
            pytest.skip(str(err))
        results.append([kernel(x[:rows]) for rows in (1, 2, 4, 19, 31)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("outputs", [32, 4160])
def test_the_number_of_threads_does_not_matter(outputs: int, restore: None) -> None:
    kernel, x, seen = build(dense(320, outputs, torch.float16)), random(400, 320), []
    for threads in (1, 2, 3, 7):
        native.ops().set_threads(threads)
        seen.append([kernel(x), kernel(x[:3]), kernel(x[:1])])
    for other in seen[1:]:
        assert all(same_bits(a, b) for a, b in zip(seen[0], other, strict=True))


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    w = dense(32, 32, torch.float32)
    quantized = load_linear(exl2_tensors([(4, 32)], 32), LinearShape(32, 32), where="m")
    assert "not dense" in Exl2Cpu.refuses(w, CPU)
    assert "not dense" in GptqCpu.refuses(w, CPU)
    assert "not exl2" in DenseCpu.refuses(quantized, CPU)
    assert "not on meta" in DenseCpu.refuses(w, torch.device("meta"))
    assert DenseCpu.refuses(w, CPU) is None and Exl2Cpu.refuses(quantized, CPU) is None
    monkeypatch.setattr(native, "available", lambda: "no compiler")
    assert "no compiler" in DenseCpu.refuses(w, CPU)
