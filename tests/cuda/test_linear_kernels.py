"""The choice of CUDA matrices, dense ones, several at once, and how work is cut."""

import gc
from itertools import accumulate
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from cuda_matrices import EVERY_WIDTH, assert_sums, exl2, gptq, halves, packed, random, unrounded
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import dense_tensors, exl2_tensors
from oracles import same_bits

from exl_runtime.errors import BackendUnavailable
from exl_runtime.formats import LinearShape, load_linear
from exl_runtime.ops.activation import gated
from exl_runtime.ops.linear import select, workspace_cuda
from exl_runtime.ops.linear.dense_cuda import DenseCuda
from exl_runtime.ops.linear.exl2_cuda import Exl2Cuda
from exl_runtime.ops.linear.gptq_cuda import GptqCuda
from exl_runtime.ops.linear.packed_cuda import gated_together, into_half, multiply_together
from exl_runtime.ops.linear.plan_cuda import cut, largest_piece

Card = Any


def dense(inputs: int, outputs: int, dtype: torch.dtype) -> Any:
    return load_linear(dense_tensors(inputs, outputs, dtype), LinearShape(inputs, outputs), where="m")


def test_the_choice(card: Card) -> None:
    assert isinstance(select.select(exl2(EVERY_WIDTH, 32), card.device, "cuda"), Exl2Cuda)
    assert isinstance(select.select(gptq(4, 64, 32, 32, False), card.device, "cuda"), GptqCuda)
    assert isinstance(select.select(dense(32, 32, torch.float16), card.device, "cuda"), DenseCuda)
    if card.emulated:
        assert select.select(exl2(EVERY_WIDTH, 32), card.device).backend != "cuda"  # never the emulation unasked


def test_refusals_say_why() -> None:
    with pytest.raises(BackendUnavailable, match="need a CUDA device"):
        select.select(exl2(EVERY_WIDTH, 32), torch.device("meta"), "cuda")
    assert Exl2Cuda.refuses(dense(32, 32, torch.float16), torch.device("cpu")) == "takes exl2 weights, not dense"


def test_storage_is_about_that_of_the_file(card: Card) -> None:
    w = exl2([(5, 128), (4, 896)], 256)
    assert packed(w, card.device).storage_bytes * 8 < 1.02 * w.storage_bits() + 8 * 4000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense(card: Card, dtype: torch.dtype) -> None:
    w = dense(96, 40, dtype)
    kernel = select.select(w, card.device, "cuda")
    assert isinstance(kernel, DenseCuda)
    for rows in (1, 5):
        x = halves(rows, 96)
        assert_sums(kernel.float32(*card.on(x)), x, w.dequantize().double(), inputs=2.0**-20)
        assert same_bits(kernel(*card.on(x)), kernel.float32(*card.on(x)).half()) or not card.emulated
        wide = random(rows, 96) * 1e9
        assert_sums(kernel(*card.on(wide)), wide, w.dequantize().double(), inputs=2.0**-11)
    assert kernel.storage_bytes == w.weight.nbytes


def test_dense_weights_beyond_half_stay_bfloat16(card: Card) -> None:
    w = load_linear({"weight": torch.full((8, 16), 1e6).bfloat16()}, LinearShape(16, 8), where="m")
    kernel = select.select(w, card.device, "cuda")
    y = kernel(*card.on(torch.ones(1, 16)))
    assert torch.equal(y.cpu(), w.dequantize().sum(0)[None])


def same_order(*layouts: tuple[list[tuple[int, int]], int]) -> list[Any]:
    """EXL2 matrices with one permutation, as the projections of a layer have."""
    made, invperm = [], None
    for seed, (layout, outputs) in enumerate(layouts):
        tensors = exl2_tensors(layout, outputs, seed=seed)
        invperm = tensors["q_invperm"] if invperm is None else invperm
        tensors["q_invperm"] = invperm
        made.append(load_linear(tensors, LinearShape(320, outputs), where="m"))
    return made


@pytest.mark.parametrize("rows", [1, 8, 20, 40])
def test_together(card: Card, rows: int) -> None:
    formats = same_order((EVERY_WIDTH, 160), ([(5, 320)], 33), ([(4, 160), (2, 160)], 64))
    kernels = [packed(w, card.device) for w in formats]
    x = halves(rows, 320)
    results = multiply_together(kernels, *card.on(x))
    assert results is not None
    for w, y, kernel in zip(formats, results, kernels, strict=True):
        alone = kernel.float32(*card.on(x))
        torch.testing.assert_close(y.float(), alone, rtol=2**-10, atol=1e-5)
        assert y.shape == (rows, w.shape.out_features) and y.dtype == torch.float16
    if rows <= 8:
        first = multiply_together(kernels, *card.on(x[:1]))
        assert first is not None
        assert all(same_bits(a, b[:1]) for a, b in zip(first, results, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_gated(card: Card, activation: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_cuda, "FEWEST_UNITS", 2)
    formats = same_order((EVERY_WIDTH, 168), ([(5, 160), (4, 160)], 168))
    gate, up = (packed(w, card.device) for w in formats)
    x = halves(rows, 320) * 8
    y = gated_together(gate, up, *card.on(x), activation, wide=True)
    assert y is not None and y.dtype == torch.float32
    exact = unrounded if rows <= 32 else lambda w: w.dequantize().double()
    expected = gated(x.double() @ exact(formats[0]), x.double() @ exact(formats[1]), activation)
    sizes = [x.double().abs() @ exact(w).abs() for w in formats]
    relative = (320 / 8 + 64) * 2.0**-22
    ups = x.double() @ exact(formats[1])
    # An activation is at most 1.13 times as steep as its input; evaluated within 2^-20 of its input's size.
    bound = relative * (1.13 * sizes[0] * (ups.abs() + sizes[1] * relative) + sizes[0] * sizes[1])
    bound = bound + 2.0**-20 * sizes[0] * ups.abs()
    assert ((y.cpu().double() - expected).abs() <= bound).all()
    assert bound.mean() < 1e-2 * expected.abs().mean()  # or it would say nothing
    half = gated_together(gate, up, *card.on(x), activation)
    assert half is not None and same_bits(half, y.half())
    if rows == 20:
        card.every_order(lambda: gated_together(gate, up, *card.on(x), activation, wide=True))
        for some in (1, 8, 9):
            few = gated_together(gate, up, *card.on(x[:some]), activation, wide=True)
            assert few is not None and same_bits(few, y[:some])


def test_not_gated(card: Card) -> None:
    a, b = (packed(w, card.device) for w in same_order((EVERY_WIDTH, 64), (EVERY_WIDTH, 32)))
    (x,) = card.on(halves(2, 320))
    assert gated_together(a, b, x, "silu") is None
    assert gated_together(a, a, x, "tanh") is None
    assert gated_together(a, packed(exl2(EVERY_WIDTH, 64, seed=3), card.device), x, "silu") is None


def test_not_together(card: Card) -> None:
    a, b = packed(exl2(EVERY_WIDTH, 32, seed=1), card.device), packed(exl2(EVERY_WIDTH, 32, seed=2), card.device)
    (x,) = card.on(halves(2, 320))
    assert multiply_together([a, b], x) is None  # different orders of the inputs
    assert multiply_together([a, b], x) is None
    assert multiply_together([a] * 9, x) is None
    (x,) = card.on(halves(257, 320))
    assert multiply_together([a, a], x) is None


def test_leading_dimensions_are_kept(card: Card) -> None:
    kernel = packed(exl2(EVERY_WIDTH, 40), card.device)
    (x,) = card.on(halves(2, 3, 320))
    assert kernel(x).shape == (2, 3, 40)
    assert same_bits(kernel(x).view(6, 40), kernel(x.view(6, 320)))


def test_halves_and_factors() -> None:
    x = torch.tensor([[3e38, 1.0], [0.0, 0.0], [1e-30, -1e-31], [float("nan"), 1.0], [float("inf"), 2.0]])
    half, factor = into_half(x)
    assert factor is not None
    largest = half[[0, 2]].abs().amax(1)
    assert ((largest >= 2**14) & (largest <= 2**15)).all()
    assert torch.equal(factor[[1, 3, 4]], torch.ones(3, 1)) and half[3, 0].isnan() and half[4, 0].isinf()
    assert torch.allclose(half[2].float() * factor[2], x[2], rtol=2**-11, atol=0.0)


def test_outgrown_buffers_stay_for_recorded_graphs(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_cuda, "_workspaces", {})
    space = workspace_cuda.workspace(card.device)
    space.reserve(64, 64)
    before = space.staged
    space.reserve(32, 32)
    assert space.staged is before
    space.reserve(128, 128)
    assert space.staged is not before and any(old is before for old in space.outgrown)


def test_the_last_matrix_takes_the_buffers_along(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_cuda, "_workspaces", WeakValueDictionary())
    first, second = (packed(exl2(EVERY_WIDTH, 32), card.device) for _ in range(2))
    first(*card.on(halves(1, 320)))
    del first
    gc.collect()
    assert len(workspace_cuda._workspaces) == 1
    second(*card.on(halves(1, 320)))
    del second
    gc.collect()
    assert len(workspace_cuda._workspaces) == 0


@settings(max_examples=60, deadline=None)
@given(
    matrices=st.lists(
        st.tuples(st.integers(1, 400), st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=1, max_size=40)),
        min_size=1,
        max_size=4,
    ),
    width=st.sampled_from([2, 4]),
    blocks=st.integers(1, 60),
    fewest=st.integers(1, 20),
)
def test_cuts_cover_everything_once(
    matrices: list[tuple[int, list[int]]], width: int, blocks: int, fewest: int
) -> None:
    lined = [(outputs, tuple(accumulate(widths, initial=0))) for outputs, widths in matrices]
    slots = 2 * blocks + 8
    plan = cut(lined, width=width, blocks=blocks, fewest=fewest, most_slots=slots)
    assert plan.slots <= slots and plan.first[0] == 0 and plan.first[-1] == len(plan.segments)
    assert len(plan.first) - 1 <= blocks and all(a < b for a, b in zip(plan.first, plan.first[1:], strict=False))
    pieces: dict[tuple[int, int], list[Any]] = {}
    for segment in plan.segments:
        pieces.setdefault(segment[:2], []).append(segment[2:])
    wanted = {(i, c) for i, (n, _) in enumerate(lined) for c in range(0, -(-n // 32), width)}
    assert set(pieces) == wanted
    taken: set[int] = set()
    for (number, _), parts in pieces.items():
        units = len(lined[number][1]) - 1
        ends = [0]
        for index, (begin, end, piece, count, slot, _) in enumerate(parts):
            assert begin == ends[-1] and end > begin and piece == index and count == len(parts)
            assert slot == parts[0][4]
            ends.append(end)
            assert end - begin >= min(fewest, units)
        assert ends[-1] == units
        if len(parts) > 1:
            own = set(range(parts[0][4], parts[0][4] + len(parts)))
            assert not own & taken and max(own) < plan.slots
            taken |= own


@pytest.mark.parametrize("processors", [64, 82, 128, 132, 170])
def test_pieces_have_about_equal_bytes(processors: int) -> None:
    """The busiest block has at most a quarter more than its share, for the matrices of usual models and cards."""
    lines = tuple(accumulate([6] * 12 + [4] * 84 + [3] * 32, initial=0))
    long = tuple(accumulate([5] * 44 + [4] * 300, initial=0))
    for matrices in (
        [(4096, lines)],
        [(4096, lines), (1024, lines), (1024, lines)],
        [(11008, lines), (11008, lines)],
        [(4096, long)],
        [(128256, lines)],
    ):
        blocks = processors * workspace_cuda.BLOCKS_PER_PROCESSOR
        plan = cut(matrices, width=2, blocks=blocks, fewest=workspace_cuda.FEWEST_UNITS, most_slots=2 * blocks + 8)
        total = sum(-(-outputs // 64) * lined[-1] for outputs, lined in matrices)
        assert largest_piece(plan, matrices) <= 1.25 * total / blocks, (matrices[0][0], len(plan.first) - 1)
