"""The reference multiplication: every format, any shape; and the choice of kernels."""

import pytest
import torch
from matrices import dense_tensors, exl2_tensors, gptq_tensors
from oracles import assert_as_good_as

from exl_runtime.errors import BackendUnavailable
from exl_runtime.formats import LinearShape, QuantFormat, load_linear
from exl_runtime.formats.hints import GptqHints
from exl_runtime.ops.linear import reference, select
from exl_runtime.ops.linear.base import LinearKernel
from exl_runtime.ops.linear.reference import Reference

CPU = torch.device("cpu")
LAYOUT = [(6, 64), (4, 96), (3, 32)]
MAKERS = {
    "exl2": lambda outputs: exl2_tensors(LAYOUT, outputs),
    "gptq": lambda outputs: gptq_tensors(4, 192, outputs, 64, act_order=True),
    "dense float32": lambda outputs: dense_tensors(192, outputs),
    "dense float16": lambda outputs: dense_tensors(192, outputs, torch.float16),
    "dense bfloat16": lambda outputs: dense_tensors(192, outputs, torch.bfloat16),
}


def matrix(kind: str, outputs: int) -> QuantFormat:
    hints = GptqHints(layout="gptq_v2", sym=False)
    return load_linear(MAKERS[kind](outputs), LinearShape(192, outputs), where=kind, hints=hints)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("outputs", [1, 32, 67])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("small", [True, False])
def test_against_float64(
    kind: str, outputs: int, rows: tuple[int, ...], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(reference, "PANEL", 192 * 20)  # panels of 20 output features, the last one partial
    w = matrix(kind, outputs)
    kernel = Reference(w, CPU)
    x = torch.randn(*rows, 192, generator=torch.Generator().manual_seed(1))
    weight = w.dequantize()
    y = kernel(x)
    assert y.dtype == torch.float32 and y.shape == (*rows, outputs)
    assert_as_good_as(y, x @ weight, x.double() @ weight.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    w = matrix("exl2", 64)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = Reference(w, CPU)(x)
    exact = x.double() @ w.dequantize().double()
    assert y.dtype == dtype
    assert_as_good_as(y, exact.to(dtype), exact, factor=1.01)


def test_big_matrices_are_held_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Reference(matrix("exl2", 64), CPU).storage_bytes == 192 * 64 * 4
    monkeypatch.setattr(reference, "PANEL", 192 * 20)
    for kind, size in (("exl2", 2), ("gptq", 2), ("dense float32", 4), ("dense float16", 2), ("dense bfloat16", 2)):
        assert Reference(matrix(kind, 64), CPU).storage_bytes == 192 * 64 * size


class Fussy(LinearKernel):
    """Refuses everything but GPTQ."""

    backend = "fussy"

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        return None if w.name == "gptq" else f"{w.name} is beneath me"

    def __init__(self, w: QuantFormat, device: torch.device) -> None:
        self.shape = w.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @property
    def storage_bytes(self) -> int:
        return 0


def test_select_takes_the_first_that_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "KERNELS", (Fussy, Reference))
    assert isinstance(select.select(matrix("gptq", 32), CPU), Fussy)
    assert isinstance(select.select(matrix("exl2", 32), CPU), Reference)
    assert isinstance(select.select(matrix("gptq", 32), CPU, "reference"), Reference)


def test_select_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "KERNELS", (Fussy, Reference))
    with pytest.raises(BackendUnavailable, match="Fussy: exl2 is beneath me"):
        select.select(matrix("exl2", 32), CPU, "fussy")
    with pytest.raises(BackendUnavailable, match=r"'tpu'; there are fussy, reference"):
        select.select(matrix("exl2", 32), CPU, "tpu")


def test_reference_is_the_last_resort_for_everything() -> None:
    assert select.KERNELS[-1] is Reference
    assert all(Reference.refuses(matrix(kind, 32), CPU) is None for kind in MAKERS)
