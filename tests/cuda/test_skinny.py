"""Products of up to 32 rows: exact codes, sums in float32, the same bits in any batch and any order of threads."""

from typing import Any

import pytest
import torch
from cuda_matrices import EVERY_WIDTH, MATRICES, assert_sums, exl2, gptq, halves, packed, random, symmetric, unrounded
from oracles import same_bits

from exl_runtime.ops.linear import workspace_cuda

Card = Any


@pytest.fixture(params=[1, 4, 13])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, card: Card) -> int:
    """Cards with this many processors cut the same work differently: in one piece, in columns, inside columns."""
    monkeypatch.setattr(workspace_cuda, "_workspaces", {})
    monkeypatch.setattr(workspace_cuda, "FEWEST_UNITS", 2)
    made = workspace_cuda.workspace(card.device)
    made.processors = request.param
    slots = 2 * request.param * workspace_cuda.BLOCKS_PER_PROCESSOR + 8
    made.tickets = torch.zeros(slots, dtype=torch.int32, device=card.device)
    made.partials = torch.full((slots * 64 * 128,), float("nan"), device=card.device)
    return request.param


@pytest.mark.parametrize("name", MATRICES)
def test_sums(card: Card, name: str) -> None:
    w = MATRICES[name]()
    kernel, weight = packed(w, card.device), unrounded(w)
    x = halves(32, weight.shape[0])
    whole = kernel.float32(*card.on(x))
    assert_sums(whole, x, weight)
    assert same_bits(kernel(*card.on(x)), whole.half())
    assert kernel(*card.on(x[:0])).shape == (0, weight.shape[1])


def test_any_cut(card: Card, cut: int) -> None:
    for w in (exl2(EVERY_WIDTH, 290), gptq(3, 1024, 96, 64, act_order=True), symmetric(4, 1536, 64, 128)):
        kernel, weight = packed(w, card.device), unrounded(w)
        x = halves(19, weight.shape[0])
        assert_sums(kernel.float32(*card.on(x)), x, weight)
        assert not workspace_cuda.workspace(card.device).tickets.any()
        assert_sums(kernel.float32(*card.on(x[:3])), x[:3], weight)


def test_the_same_bits_in_any_batch(card: Card, cut: int) -> None:
    for w in (exl2(EVERY_WIDTH, 100), gptq(4, 640, 96, 40, act_order=True)):
        kernel = packed(w, card.device)
        (x,) = card.on(halves(32, w.shape.in_features))
        whole = kernel.float32(x)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 25):
            assert same_bits(kernel.float32(x[:rows]), whole[:rows]), f"{rows} rows"
        assert same_bits(kernel.float32(x[30:31]), whole[30:31])
        assert same_bits(kernel.float32(x[20:29])[5:6], whole[25:26])


@pytest.mark.parametrize("rows", [1, 8, 11, 32])
def test_the_order_of_threads_does_not_matter(card: Card, cut: int, rows: int) -> None:
    kernel = packed(exl2([(5, 512), (4, 960), (3, 544)], 130), card.device)
    (x,) = card.on(halves(rows, 2016))
    card.every_order(lambda: kernel.float32(x))
    assert not workspace_cuda.workspace(card.device).tickets.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_other_types(card: Card, dtype: torch.dtype) -> None:
    """Rows from 1e-30 to 1e30: scaled into the range of half, 11 bits of every number near the largest are kept."""
    w = exl2(EVERY_WIDTH, 64)
    kernel, weight = packed(w, card.device), unrounded(w)
    x = (random(9, 320) * torch.logspace(-30, 30, 9)[:, None]).to(dtype)
    x[4] = 0
    y = kernel(*card.on(x))
    assert y.dtype == dtype and torch.equal(y[4].cpu(), torch.zeros(64, dtype=dtype))
    wide = kernel.float32(*card.on(x))
    # 11 bits of every number; in a row whose largest number has become 2^14 or more, halves are 2^-24 apart or finer.
    bound = 2.0**-11 * x.double().abs() + 2.0**-39 * x.double().abs().amax(1, keepdim=True)
    sums = (320 / 8 + 64) * 2.0**-22 * (x.double().abs() @ weight.abs())
    assert ((wide.cpu().double() - x.double() @ weight).abs() <= bound @ weight.abs() + sums).all()
    assert same_bits(y, wide.to(dtype))


def test_a_row_of_bfloat16_beyond_half(card: Card) -> None:
    w = symmetric(4, 256, 32, 32)
    x = random(2, 256) * 1e6
    y = packed(w, card.device)(*card.on(x.bfloat16()))
    expected = x.bfloat16().double() @ unrounded(w)
    assert (y.cpu().double() - expected).abs().max() < 2**-7 * expected.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_non_finite_inputs_stay_in_their_row(card: Card, bad: float, dtype: torch.dtype) -> None:
    kernel = packed(exl2(EVERY_WIDTH, 32), card.device)
    (x,) = card.on(random(7, 320).to(dtype))
    clean = kernel(x)
    x[3, 5] = bad
    y = kernel(x)
    assert not y[3].isfinite().any()
    assert same_bits(torch.cat([y[:3], y[4:]]), torch.cat([clean[:3], clean[4:]]))


def test_the_product_is_added_to_a_stream(card: Card) -> None:
    w = exl2(EVERY_WIDTH, 72)
    kernel = packed(w, card.device)
    x, stream = card.on(halves(5, 320), random(5, 72, seed=1))
    expected = stream + kernel.float32(x)
    assert kernel.add_to(stream, x) is stream
    assert same_bits(stream, expected)


def test_bias(card: Card) -> None:
    from exl_runtime.ops.linear.packed_cuda import Plan

    w = exl2(EVERY_WIDTH, 72)
    kernel = packed(w, card.device)
    x, bias = card.on(halves(5, 320), halves(72, seed=2))
    (y,) = Plan([kernel.matrix], workspace_cuda.workspace(card.device), biases=[bias])(x, wide=True)
    assert same_bits(y, kernel.float32(x) + bias.float())


def test_the_staged_input_is_the_one_drawn(card: Card) -> None:
    """skinny_stage.h read literally, through the buffer that a product leaves behind."""
    w = exl2([(4, 64)], 32)
    kernel = packed(w, card.device)
    x = halves(3, 64)
    kernel(*card.on(x))
    staged = workspace_cuda.workspace(card.device).staged[: 2 * 3 * 32].view(2, 3, 32).cpu()
    assert w.perm is not None
    for unit in range(2):
        for t in range(4):
            for o in range(4):
                for e in range(2):
                    position = 32 * unit + 8 * o + 2 * t + e
                    assert torch.equal(staged[unit, :, 8 * t + 2 * o + e], x[:, w.perm[position]])


def test_the_operator_says_what_is_wrong(card: Card) -> None:
    kernel = packed(exl2(EVERY_WIDTH, 32), card.device)
    plan, space = kernel._plan, workspace_cuda.workspace(card.device)
    (x,) = card.on(halves(3, 64))
    with pytest.raises(RuntimeError, match=r"x must have shape \(\*, 320\)"):
        plan(x)
    (x,) = card.on(halves(257, 320))
    with pytest.raises(RuntimeError, match="at most 256 rows, got 257"):
        plan(x)
    with pytest.raises(RuntimeError, match="x must be a contiguous"):
        plan(x[:4].t().contiguous().t())
    with pytest.raises(RuntimeError, match="plan was not made by"):
        card.ops.linear_multiply(x, torch.zeros(8, dtype=torch.uint8), space.staged, space.factors, False, None)
    with pytest.raises(RuntimeError, match=r"stream must have shape \(4, 32\)"):
        plan(x[:4].contiguous(), stream=torch.zeros(3, 32, device=card.device))
