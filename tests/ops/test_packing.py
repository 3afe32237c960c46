"""Packing in another order of inputs and outputs, into given memory, by every instruction set: never another bit."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from matrices import exl2_tensors, gptq_tensors
from oracles import same_bits

from exl_runtime.formats import FormatHints, LinearShape, load_linear
from exl_runtime.formats.base import QuantFormat
from exl_runtime.memory import ALIGN, Arena
from exl_runtime.ops import native
from exl_runtime.ops.linear import select
from exl_runtime.ops.linear.packed_cpu import PackedCpu
from exl_runtime.ops.linear.packing import Packing, Workshop
from exl_runtime.ops.linear.stored_cpu import StoredCpu, repacked

CPU = torch.device("cpu")
EVERY_WIDTH = [(8, 32), (6, 64), (5, 32), (4, 96), (3, 64), (2, 32)]  # K = 320

pytestmark = pytest.mark.usefixtures("kernels")


def exl2(outputs: int, permuted: bool = True) -> QuantFormat:
    return load_linear(
        exl2_tensors(EVERY_WIDTH, outputs, permuted=permuted, seed=3), LinearShape(320, outputs), where="m"
    )


def gptq(bits: int, outputs: int, group_size: int, act_order: bool, symmetric: bool = False) -> QuantFormat:
    tensors = gptq_tensors(bits, 320, outputs, group_size, act_order=act_order, seed=3)
    hints = FormatHints.from_json({"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": False})
    w = load_linear(tensors, LinearShape(320, outputs), where="m", hints=hints)
    if symmetric:
        w.zeros.fill_(1 << (bits - 1))  # type: ignore[attr-defined]
    return w


# With the first 16 digits of the SHA-256 of what packing makes of them.
MATRICES: dict[str, tuple[Callable[[], QuantFormat], str]] = {
    "exl2": (lambda: exl2(96), "ad4364325db387ef"),
    "exl2, 33 columns, in order": (lambda: exl2(33, permuted=False), "355370db3ab1751b"),
    "gptq 2 bit, order": (lambda: gptq(2, 48, 32, True), "08d778b2ec43b6ef"),
    "gptq 3 bit": (lambda: gptq(3, 40, 64, False), "c4a00be3ebd6bbbc"),
    "gptq 4 bit, order, 33 columns": (lambda: gptq(4, 33, 32, True), "02ff34c665d19db1"),
    "gptq 4 bit, symmetric": (lambda: gptq(4, 40, 32, False, symmetric=True), "582b62b9406a0b3c"),
    "gptq 4 bit, groups of 40, order": (lambda: gptq(4, 40, 40, True), "3a2ff1fdc3390472"),
    "gptq 8 bit": (lambda: gptq(8, 16, -1, True), "39a222b41300c17b"),
}


@pytest.fixture(params=MATRICES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(w: QuantFormat, packing: Packing | None = None) -> PackedCpu:
    kernel = select.select(w, CPU, "cpu", packing)
    assert isinstance(kernel, PackedCpu)
    return kernel


def inputs(rows: int) -> torch.Tensor:
    return torch.randn(rows, 320, generator=torch.Generator().manual_seed(1))


def test_the_bytes_are_those_of_this_version(name: str, isa: str) -> None:
    """When this fails because packing was changed on purpose, raise kPackedMagic in ext/cpu/tiles.h, or PACKING in
    exl_runtime/runtime/packed.py: packed models on the disks of users are read as long as both stay."""
    make, digest = MATRICES[name]
    packed = build(make()).packed
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == digest
    assert native.ops().packed_layout() == 0x32656C6974786C65


def test_outputs_in_another_order(name: str, isa: str) -> None:
    w = MATRICES[name][0]()
    order = torch.randperm(w.shape.out_features, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    kernel = build(w, Packing(outputs=order))
    assert kernel.output_order is order and kernel.shape == w.shape
    for rows in (1, 19):
        assert same_bits(kernel(inputs(rows)), build(w)(inputs(rows))[:, order.long()])


def test_inputs_in_the_order_of_the_packed_rows(name: str) -> None:
    w = MATRICES[name][0]()
    kernel = build(w, Packing(sort_inputs=True))
    x = inputs(7)
    sorted_x = x if kernel.input_order is None else x[:, kernel.input_order.long()].contiguous()
    assert same_bits(kernel(sorted_x), build(w)(x))
    permuted = "order" in name or name == "exl2"
    assert (kernel.input_order is not None) == (permuted and "groups of 40" not in name and "in order" not in name)


def test_a_stored_matrix_is_the_same_kernel(name: str) -> None:
    w = MATRICES[name][0]()
    made = build(w, Packing(sort_inputs=True))
    order = None if made.input_order is None else made.input_order.view(torch.uint8)
    stored = StoredCpu(made.packed.clone(), w.shape, Packing(), order)
    assert same_bits(stored(inputs(3)), made(inputs(3)))
    if made.input_order is not None:
        assert torch.equal(stored.input_order, made.input_order)
    stored.hurry()
    assert repacked(w.name) and StoredCpu.refuses(w, CPU)


def test_matrices_lie_together(name: str) -> None:
    arena = Arena(1 << 20)
    w = MATRICES[name][0]()
    first, second = build(w, Packing(take=arena.take)), build(w, Packing(take=arena.take))
    assert same_bits(first.packed, second.packed)
    assert second.packed.data_ptr() - first.packed.data_ptr() == -(-first.packed.nbytes // ALIGN) * ALIGN


def test_what_is_packed_may_be_overwritten() -> None:
    """Codes are lent: after packing nothing may look at them again."""
    shop = Workshop(1 << 20)
    tensors = exl2_tensors(EVERY_WIDTH, 64, seed=5)
    want = build(load_linear(tensors, LinearShape(320, 64), where="m"))(inputs(2))
    words = tensors["q_weight"]
    lent = shop.lend(words.nbytes).view(torch.int32).view(words.shape).copy_(words)
    kernel = build(load_linear({**tensors, "q_weight": lent}, LinearShape(320, 64), where="m"), Packing(take=shop.keep))
    shop.lend(words.nbytes).fill_(0xAA)
    assert same_bits(kernel(inputs(2)), want)


@pytest.mark.parametrize("wrong", [-1, 40])
def test_an_order_that_leads_outside_is_refused(wrong: int) -> None:
    order = torch.arange(40, dtype=torch.int32)
    order[7] = wrong
    with pytest.raises(RuntimeError, match=rf"columns\[7\] is {wrong} of 40"):
        build(gptq(4, 40, 32, False), Packing(outputs=order))
    with pytest.raises(RuntimeError, match="columns must have shape"):
        build(gptq(4, 40, 32, False), Packing(outputs=order[:-1].contiguous()))
