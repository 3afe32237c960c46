"""Broken tensors: one clear FormatError each, naming the matrix, the tensor and what was wanted."""

from collections.abc import Callable

import pytest
import torch
from matrices import dense_tensors, exl2_tensors, gptq_tensors

from exl_runtime.errors import FormatError, NonFiniteError
from exl_runtime.formats import LinearShape, load_linear

Tensors = dict[str, torch.Tensor]
WHERE = "model.layers.0.mlp.up_proj in weights.safetensors"


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """A mutation that replaces one tensor."""

    def mutate(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name].clone())

    return mutate


def drop(name: str) -> Callable[[Tensors], None]:
    def mutate(tensors: Tensors) -> None:
        del tensors[name]

    return mutate


def assign(index: object, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def cast(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.view(dtype) if dtype.itemsize < 4 and tensor.dtype == torch.int32 else tensor.to(dtype)


def swap(tensor: torch.Tensor) -> torch.Tensor:
    """First and last entry equal: a permutation no longer."""
    tensor[0] = tensor[-1]
    return tensor


EXL2 = {  # layout [(6, 32), (4, 64), (3, 32)], 64 columns; q_groups is [6, 0, 4, 6, 3, 14], q_weight has 17 rows
    "q_scale missing": (drop("q_scale"), "q_scale"),
    "q_scale_max missing": (drop("q_scale_max"), "q_scale_max"),
    "q_groups missing": (drop("q_groups"), "q_groups"),
    "q_weight int64": (put("q_weight", cast(torch.int64)), "q_weight is int64"),
    "q_weight as bytes": (put("q_weight", cast(torch.uint8)), "q_weight is uint8"),
    "q_weight one row short": (put("q_weight", lambda t: t[:-1]), "q_groups entry 2"),
    "q_weight three rows short": (put("q_weight", lambda t: t[:-3]), "q_groups entry 2"),
    "q_weight one block long": (put("q_weight", lambda t: torch.cat([t, t[:3]])), "160 rows"),
    "q_weight narrow": (put("q_weight", lambda t: t[:, :32]), "q_weight has shape"),
    "q_weight not padded": (put("q_weight", lambda t: t[:, :60]), "q_weight has shape"),
    "q_weight flat": (put("q_weight", lambda t: t.flatten()), "q_weight has shape"),
    "q_weight empty": (put("q_weight", lambda t: t[:0]), "q_groups entry"),
    "q_scale narrow": (put("q_scale", lambda t: t[:, :4]), "q_scale has shape"),
    "q_scale short": (put("q_scale", lambda t: t[:2]), "q_scale has shape"),
    "q_scale as half": (put("q_scale", cast(torch.float16)), "q_scale is float16"),
    "q_scale_max long": (put("q_scale_max", lambda t: torch.cat([t, t])), "q_scale_max has shape"),
    "q_scale_max int16": (put("q_scale_max", lambda t: t.view(torch.int16)), "q_scale_max is int16"),
    "q_scale_max per column": (put("q_scale_max", lambda t: t[:, None]), "q_scale_max has shape"),
    "q_groups odd": (put("q_groups", lambda t: t[:-1]), "q_groups has 5"),
    "q_groups empty": (put("q_groups", lambda t: t[:0]), "q_groups has 0"),
    "q_groups int32": (put("q_groups", cast(torch.int32)), "q_groups is int32"),
    "q_groups width 7": (put("q_groups", assign(0, 7)), "7 bits"),
    "q_groups width 0": (put("q_groups", assign(4, 0)), "0 bits"),
    "q_groups widths rise": (put("q_groups", assign(4, 6)), "non-increasing"),
    "q_groups late start": (put("q_groups", assign(1, 1)), "starts at row 1"),
    "q_groups offsets fall": (put("q_groups", assign(3, 15)), "q_groups entry"),
    "q_groups offset repeated": (put("q_groups", assign(3, 0)), "q_groups entry 0"),
    "q_groups offset beyond": (put("q_groups", assign(5, -1)), "q_groups entry"),
    "q_groups cut inside a block": (put("q_groups", assign(3, 7)), "whole blocks"),
    "q_invperm short": (put("q_invperm", lambda t: t[:-1]), "q_invperm has shape"),
    "q_invperm int16": (put("q_invperm", lambda t: t.to(torch.int16)), "q_invperm is int16"),
    "q_invperm repeats": (put("q_invperm", swap), "more than once"),
    "q_invperm negative": (put("q_invperm", assign(5, -1)), "holds -1"),
    "q_invperm beyond": (put("q_invperm", assign(5, 128)), "holds 128"),
}
GPTQ = {  # 4 bit, 128 x 64, groups of 32
    "qzeros missing": (drop("qzeros"), "qzeros"),
    "scales missing": (drop("scales"), "scales"),
    "qweight int64": (put("qweight", cast(torch.int64)), "qweight is int64"),
    "qweight as bytes": (put("qweight", cast(torch.uint8)), "qweight is uint8"),
    "qweight as half": (put("qweight", cast(torch.float16)), "qweight is float16"),
    "qweight one row short": (put("qweight", lambda t: t[:-1]), "qweight has 15 rows"),
    "qweight 5 bits": (put("qweight", lambda t: torch.cat([t, t[:4]])), "qweight has 20 rows"),
    "qweight empty": (put("qweight", lambda t: t[:0]), "qweight has 0 rows"),
    "qweight narrow": (put("qweight", lambda t: t[:, :32]), "qweight has shape"),
    "qweight of half the rows": (put("qweight", lambda t: t[:8]), "qzeros has shape"),
    "qweight along columns": (put("qweight", lambda t: t.new_zeros(128, 8)), "AWQ"),
    "qzeros narrow": (put("qzeros", lambda t: t[:, :7]), "qzeros has shape"),
    "qzeros short": (put("qzeros", lambda t: t[:2]), "qzeros has shape"),
    "qzeros as half": (put("qzeros", cast(torch.float16)), "qzeros is float16"),
    "scales int32": (put("scales", cast(torch.int32)), "scales is int32"),
    "scales flat": (put("scales", lambda t: t.flatten()), "scales has shape"),
    "scales without groups": (put("scales", lambda t: t[:0]), "0 groups"),
    "scales of too many groups": (put("scales", lambda t: t.repeat(64, 1)), "256 groups"),
    "g_idx short": (put("g_idx", lambda t: t[:-1]), "g_idx has shape"),
    "g_idx beyond": (put("g_idx", assign(3, 4)), "g_idx holds 4"),
    "g_idx far below": (put("g_idx", assign(3, -5)), "g_idx holds -5"),
    "g_idx as float": (put("g_idx", cast(torch.float32)), "g_idx is float32"),
    "g_idx beyond 32 bits": (put("g_idx", lambda t: t.long() + (1 << 32)), "g_idx holds"),
}
DENSE = {
    "weight flat": (put("weight", lambda t: t.flatten()), "weight has shape"),
    "weight transposed": (put("weight", lambda t: t.t().contiguous()), "weight has shape (128, 64)"),
    "weight short": (put("weight", lambda t: t[:-1]), "weight has shape"),
    "weight int8": (put("weight", cast(torch.int8)), "weight is int8"),
    "weight fp8": (put("weight", cast(torch.float8_e4m3fn)), "weight is float8_e4m3fn"),
    "weight bool": (put("weight", cast(torch.bool)), "weight is bool"),
}
NON_FINITE = {
    "exl2 nan": ("exl2", put("q_scale_max", assign(1, float("nan"))), "q_scale_max[1]"),
    "exl2 inf": ("exl2", put("q_scale_max", assign(2, float("inf"))), "q_scale_max[2]"),
    "gptq nan": ("gptq", put("scales", assign((2, 63), float("nan"))), "scales[2, 63]"),
    "gptq inf": ("gptq", put("scales", assign((0, 0), float("-inf"))), "scales[0, 0]"),
    "gptq beyond half": ("gptq", put("scales", lambda t: t.float() + 1e6), "scales (rounded to half)"),
    "dense nan": ("dense", put("weight", assign((1, 2), float("nan"))), "weight[1, 2]"),
}


def valid(name: str) -> Tensors:
    if name == "exl2":
        return exl2_tensors([(6, 32), (4, 64), (3, 32)], 64)
    return gptq_tensors(4, 128, 64, 32) if name == "gptq" else dense_tensors(128, 64)


def load(tensors: Tensors) -> None:
    load_linear(tensors, LinearShape(128, 64), where=WHERE)


@pytest.mark.parametrize("name", ["exl2", "gptq", "dense"])
def test_the_unbroken_ones_load(name: str) -> None:
    load(valid(name))


@pytest.mark.parametrize(
    ("name", "mutate", "words"),
    [
        pytest.param(name, *case, id=f"{name} {label}")
        for name, cases in (("exl2", EXL2), ("gptq", GPTQ), ("dense", DENSE))
        for label, case in cases.items()
    ],
)
def test_broken(name: str, mutate: Callable[[Tensors], None], words: str) -> None:
    tensors = valid(name)
    mutate(tensors)
    with pytest.raises(FormatError) as caught:
        load(tensors)
    assert WHERE in str(caught.value) and words in str(caught.value), str(caught.value)


@pytest.mark.parametrize(("name", "mutate", "words"), NON_FINITE.values(), ids=NON_FINITE.keys())
def test_non_finite(name: str, mutate: Callable[[Tensors], None], words: str) -> None:
    tensors = valid(name)
    mutate(tensors)
    with pytest.raises(NonFiniteError) as caught:
        load(tensors)
    assert WHERE in str(caught.value) and words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", ["exl2", "gptq", "dense"])
@pytest.mark.parametrize(
    "shape", [LinearShape(96, 64), LinearShape(128, 96), LinearShape(160, 64), LinearShape(128, 31)]
)
def test_a_model_of_another_shape(name: str, shape: LinearShape) -> None:
    with pytest.raises(FormatError, match=WHERE):
        load_linear(valid(name), shape, where=WHERE)
