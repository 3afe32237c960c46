"""Expert routing: the model's own rule, and a choice that never depends on sorting."""

import math

import pytest
import torch
from conftest import unavailable
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.ops import native
from exl_runtime.ops.moe import route as reference
from exl_runtime.ops.table import opset


@pytest.fixture(params=["reference", "cpu"])
def route(request: pytest.FixtureRequest):
    if why := unavailable(request.param):
        pytest.skip(why)
    return opset(request.param).route


def test_by_hand(route) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).log_softmax(-1) + 5.0
    shares = torch.tensor([0.0, 2.0, 1.0, -1.0]).softmax(-1)
    weights, experts = route(logits, 2, False)
    assert experts.tolist() == [[1, 2]]
    assert torch.allclose(weights, shares[[1, 2]][None])
    weights, _ = route(logits, 2, True)
    assert torch.allclose(weights, (shares[[1, 2]] / shares[[1, 2]].sum())[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (128, 8), (4, 4), (3, 1)])
def test_equal_to_the_router_of_transformers(route, dtype: torch.dtype, experts: int, k: int) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    torch.manual_seed(experts)
    for normalize in (True, False):
        config = Qwen3MoeConfig(num_experts=experts, num_experts_per_tok=k, norm_topk_prob=normalize, hidden_size=16)
        router = Qwen3MoeTopKRouter(config).to(dtype)
        router.weight.data.normal_()
        with torch.no_grad():
            logits, scores, indices = router(torch.randn(50, 16).to(dtype))
        weights, chosen = route(logits, k, normalize)
        assert weights.dtype == torch.float32 and chosen.dtype == torch.int64
        if dtype == torch.float32:
            # In half precision equal logits are common, and the oracle breaks ties at will. Both sides round every
            # exponential, their sum and a quotient or two.
            assert torch.equal(chosen, indices)
            assert ((weights - scores).abs() <= 4 * 2**-24 * k * scores + 1e-30).all()
        else:
            assert torch.equal(weights.to(dtype), scores)


def test_shares_are_those_of_float64(route) -> None:
    torch.manual_seed(3)
    logits = torch.randn(300, 40) * 6
    for normalize in (False, True):
        weights, experts = route(logits, 5, normalize)
        wanted = logits.double().softmax(-1).gather(1, experts)
        assert (wanted.diff(dim=-1) <= 0).all()
        if normalize:
            wanted /= wanted.sum(-1, keepdim=True)
        # An exponential is off by its argument's rounding (in float32: up to 2^-24 of 40), then a few roundings.
        assert ((weights - wanted).abs() <= (40 + 8) * 2**-24 * wanted).all()


@given(
    rows=st.lists(st.lists(st.sampled_from([-3.0, 0.0, 1.0, 1.0 + 2**-23, 40.0]), min_size=6, max_size=6), max_size=5),
    k=st.integers(1, 6),
    normalize=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_kernel_chooses_as_the_reference(rows, k, normalize) -> None:
    if why := unavailable("cpu"):
        pytest.skip(why)
    logits = torch.tensor(rows).view(-1, 6)
    weights, experts = opset("cpu").route(logits, k, normalize)
    wanted, choice = reference(logits, k, normalize)
    shares = logits.double().softmax(-1)
    assert ((weights - wanted).abs() <= 64 * 2**-24 * wanted).all()
    # Neighbouring logits may have one share or two, as the exponential is rounded: then both choices are right.
    picked, best = shares.gather(1, experts), shares.gather(1, choice)
    assert ((picked - best).abs() <= 2**-22 * best).all()
    for row, kept in zip(logits.tolist(), experts.tolist(), strict=True):
        assert len(set(kept)) == k
        equal = [e for e in range(6) if row[e] == row[kept[-1]]]
        chosen = [e for e in kept if e in equal]
        assert chosen == equal[: len(chosen)], "of equal logits the first ones, in order"


def test_ties_go_to_the_lowest_index(route) -> None:
    logits = torch.zeros(20, 64)
    logits[:, 50:] = 1.0
    weights, experts = route(logits, 4, True)
    assert experts.tolist() == [[50, 51, 52, 53]] * 20
    assert weights.tolist() == [[0.25] * 4] * 20


def test_a_row_alone_and_on_any_number_of_threads_has_the_same_bits(route) -> None:
    torch.manual_seed(5)
    logits = torch.randn(400, 64)
    before = native.ops().set_threads(0) if native.loaded() else 1
    try:
        found = []
        for threads in (1, 3):
            if native.loaded():
                native.ops().set_threads(threads)
            found.append(route(logits, 8, True))
    finally:
        if native.loaded():
            native.ops().set_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    for row in (0, 1, 399):
        weights, experts = route(logits[row : row + 1], 8, True)
        assert torch.equal(weights[0], found[0][0][row]) and torch.equal(experts[0], found[0][1][row])


def test_far_and_missing_logits(route) -> None:
    weights, experts = route(torch.tensor([[-math.inf, 1e30, -math.inf, 3.0]]), 3, False)
    assert experts.tolist() == [[1, 0, 2]] and weights.tolist() == [[1.0, 0.0, 0.0]]
    damaged = torch.tensor([[0.0, math.nan, 2.0], [math.inf, 0.0, 1.0], [-math.inf] * 3, [1.0, 3.0, 2.0]])
    weights, experts = route(damaged, 2, True)
    assert weights[:3].isnan().all() and weights[3].isfinite().all()
    assert experts.tolist() == [[0, 1], [0, 1], [0, 1], [1, 2]]


def test_no_tokens(route) -> None:
    weights, experts = route(torch.zeros(0, 8), 2, True)
    assert weights.shape == experts.shape == (0, 2)


def test_the_kernel_refuses_more_experts_than_there_are() -> None:
    if why := unavailable("cpu"):
        pytest.skip(why)
    for k in (0, 5):
        with pytest.raises(RuntimeError, match=f"{k} experts of 4"):
            opset("cpu").route(torch.zeros(2, 4), k, False)
