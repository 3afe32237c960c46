"""Dense matrices: what is taken, what is refused."""

import pytest
import torch
from matrices import dense_tensors

from exl_runtime.errors import FormatError, NonFiniteError
from exl_runtime.formats.base import LinearShape
from exl_runtime.formats.dense import Dense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dequantize_transposes_and_keeps_values(dtype: torch.dtype) -> None:
    tensors = dense_tensors(5, 7, dtype)
    matrix = Dense.load(tensors, LinearShape(5, 7), where="m")
    weight = matrix.dequantize()
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    assert torch.equal(weight, tensors["weight"].float().t())
    assert torch.equal(matrix.columns(2, 6).dequantize(), weight[:, 2:6])
    weight.zero_()
    assert tensors["weight"].any(), "dequantize handed out the stored tensor"


def test_accounting_follows_the_stored_type() -> None:
    assert Dense.load(dense_tensors(5, 7, torch.bfloat16), LinearShape(5, 7), where="m").storage_bits() == 16 * 35
    assert Dense.load(dense_tensors(5, 7), LinearShape(5, 7), where="m").storage_bits() == 32 * 35


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_anywhere_is_found_and_located(dtype: torch.dtype, value: float) -> None:
    for place in ((0, 0), (36, 46), (17, 23), (36, 0)):
        tensors = dense_tensors(47, 37, dtype)
        tensors["weight"][place] = value
        with pytest.raises(NonFiniteError, match=rf"layer: weight\[{place[0]}, {place[1]}\] is"):
            Dense.load(tensors, LinearShape(47, 37), where="layer")


def test_float64_beyond_float32_is_refused() -> None:
    tensors = dense_tensors(3, 3, torch.float64)
    tensors["weight"][1, 1] = 1e300
    with pytest.raises(NonFiniteError, match="float32"):
        Dense.load(tensors, LinearShape(3, 3), where="m")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_other_types_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match=str(dtype).removeprefix("torch.")) as caught:
        Dense.load({"weight": torch.zeros(3, 3).to(dtype)}, LinearShape(3, 3), where="m")
    assert caught.value.hint
