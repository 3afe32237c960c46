"""The small native CPU kernels against float64 and against the plain-torch reference, for every instruction set."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_as_good_as

from exl_runtime.errors import NonFiniteError, UnsupportedModel
from exl_runtime.ops import activation, cpu_small, kv_append, native, norm, rope, sample

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 8), (1, 1), (1, 7), (3, 8), (2, 17), (5, 64), (1, 1031), (67, 257), (3, 0)]


pytestmark = pytest.mark.usefixtures("kernels")


def random(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0
) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


# RMSNorm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_as_good_as_torch(isa: str, shape: tuple[int, int], dtype: torch.dtype, offset: float) -> None:
    x, weight = random(shape, dtype, 3.0), random((shape[1],), seed=1)
    got = cpu_small.rms_norm(x, weight, 1e-5, offset)
    assert got.dtype == dtype and got.shape == x.shape
    wide = x.double()
    oracle = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)
    if x.numel():
        assert_as_good_as(got, norm.rms_norm(x, weight, 1e-5, offset), oracle)


def test_rms_norm_survives_extreme_rows(isa: str) -> None:
    x = torch.tensor([[1e30] * 9, [1e-30] * 9, [0.0] * 9])  # squares beyond float32 on both sides
    got = cpu_small.rms_norm(x, torch.ones(9), 1e-6, 0.0)
    assert torch.allclose(got[0], torch.ones(9)) and got[2].eq(0).all()
    assert torch.allclose(got[1], torch.full((9,), 1e-27))


def test_rms_norm_keeps_nan_in_its_row(isa: str) -> None:
    x = random((3, 20))
    x[1, 13] = math.nan
    got = cpu_small.rms_norm(x, torch.ones(20), 1e-6, 0.0)
    assert got[1].isnan().all() and not got[[0, 2]].isnan().any()


def test_rms_norm_takes_any_layout_and_more_dimensions() -> None:
    x, weight = random((6, 5, 32)), random((32,), seed=1)
    plain = cpu_small.rms_norm(x, weight, 1e-6, 0.0)
    assert torch.equal(cpu_small.rms_norm(x.transpose(0, 1), weight, 1e-6, 0.0), plain.transpose(0, 1))
    assert torch.equal(cpu_small.rms_norm(x[2, 3], weight, 1e-6, 0.0), plain[2, 3])


# Gated activations


@pytest.mark.parametrize("name", sorted(activation.ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_is_as_good_as_torch(isa: str, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
    gate, up = random(shape, dtype, 4.0), random(shape, dtype, seed=1)
    got = cpu_small.gated(gate, up, name)
    assert got.dtype == dtype and got.shape == gate.shape
    oracle = activation.ACTIVATIONS[name](gate.double()) * up.double()
    if gate.numel():
        assert_as_good_as(got, activation.gated(gate, up, name), oracle)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu"])
def test_activations_are_accurate_over_the_whole_line(isa: str, name: str) -> None:
    gate = torch.cat([torch.linspace(-30, 30, 60_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, 1e4, 3e38])])
    got = cpu_small.gated(gate, torch.ones_like(gate), name).double()
    wide = gate.double()
    if name == "gelu":
        oracle = wide * 0.5 * torch.special.erfc(-wide / math.sqrt(2))
    else:
        inner = wide if name == "silu" else 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        oracle = wide * torch.sigmoid(inner)
    # Relative, except where the argument of the exponential is itself large: its rounding error is multiplied.
    arguments = {"silu": wide.abs(), "gelu": wide**2 / 2, "gelu_tanh": 1.6 * (wide.abs() + 0.045 * wide.abs() ** 3)}
    bound = oracle.abs() * 6e-8 * (8 + 4 * arguments[name].clamp(max=100)) + 1e-35  # where e^88 ends, 0 is right
    assert ((got - oracle).abs() <= bound).all()


@pytest.mark.parametrize("name", sorted(activation.ACTIVATIONS))
def test_gated_keeps_nan(isa: str, name: str) -> None:
    gate = random((19,))
    gate[11] = math.nan
    got = cpu_small.gated(gate, torch.ones(19), name)
    assert got.isnan().nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("columns", [24, 1500])
def test_gated_takes_the_halves_of_a_fused_projection(columns: int) -> None:
    fused = random((2, 3, 2 * columns))
    gate, up = fused.chunk(2, -1)
    assert not gate.is_contiguous()
    assert torch.equal(cpu_small.gated(gate, up, "silu"), cpu_small.gated(gate.contiguous(), up.contiguous(), "silu"))


def test_gated_names_an_unknown_activation() -> None:
    with pytest.raises(UnsupportedModel, match="swoosh"):
        cpu_small.gated(random((4,)), random((4,)), "swoosh")


# Rotary embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (16, 16), (22, 10), (64, 32), (128, 128), (8, 0)])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_rope_equals_the_reference(isa: str, tokens: int, head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    q, k = random((tokens, 3, head_dim), dtype), random((tokens, 1, head_dim), dtype, seed=1)
    angles = random((tokens, rotary_dim // 2), scale=3.0, seed=2)
    wanted = rope.rope(q.clone(), k.clone(), angles.cos(), angles.sin())
    got = cpu_small.rope(q, k, angles.cos(), angles.sin())
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_rope_turns_slices_of_a_fused_projection_in_place() -> None:
    fused = random((5, (4 + 2 + 2) * 16))
    before, angles = fused.clone(), random((5, 8), seed=1)
    q, k = fused[:, :64].view(5, 4, 16), fused[:, 64:96].view(5, 2, 16)
    wanted = rope.rope(q.clone(), k.clone(), angles.cos(), angles.sin())
    cpu_small.rope(q, k, angles.cos(), angles.sin())
    assert torch.equal(fused[:, :64].view(5, 4, 16), wanted[0])
    assert torch.equal(fused[:, 64:96].view(5, 2, 16), wanted[1])
    assert torch.equal(fused[:, 96:], before[:, 96:])


# Appending to pages


@pytest.mark.parametrize("page_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_append_kv_equals_the_reference(isa: str, tokens: int, dtype: torch.dtype, page_dtype: torch.dtype) -> None:
    k, v = random((tokens, 2, 13), dtype), random((tokens, 2, 13), dtype, seed=1)
    pages = [random((3, 8, 2, 13), page_dtype, seed=s) for s in (2, 3)]
    wanted = [p.clone() for p in pages]
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(4))[:tokens]
    kv_append.append_kv(k, v, *wanted, slots)
    cpu_small.append_kv(k, v, *pages, slots)
    assert torch.equal(pages[0], wanted[0]) and torch.equal(pages[1], wanted[1])


@pytest.mark.parametrize("slot", [-1, 24])
def test_append_kv_refuses_a_slot_outside_and_writes_nothing(slot: int) -> None:
    pages = torch.zeros(3, 8, 2, 4)
    x = torch.ones(2, 2, 4)
    with pytest.raises(RuntimeError, match=rf"slots\[1\] is {slot}, the pages have slots 0 to 23"):
        cpu_small.append_kv(x, x, pages, pages.clone(), torch.tensor([5, slot]))
    assert not pages.any()


# Results do not depend on how the work is cut


def test_results_are_the_same_bits_for_any_thread_count_batch_and_instruction_set(restore: None) -> None:
    x, weight = random((67, 3000), scale=3.0), random((3000,), seed=1)
    angles = random((67, 50), seed=2)

    def all_ops(rows: slice) -> list[torch.Tensor]:
        heads = x[rows, :2000].reshape(-1, 20, 100)
        turned = cpu_small.rope(heads.clone(), heads[:, :2].clone(), angles[rows].cos(), angles[rows].sin())
        gates = [cpu_small.gated(x[rows], x[rows].flip(1), name) for name in ("silu", "gelu", "gelu_tanh")]
        return [cpu_small.rms_norm(x[rows], weight, 1e-6, 0.0), *gates, *turned]

    native.ops().set_threads(1)
    wanted = all_ops(slice(None))
    for count in (2, 3, 8):
        native.ops().set_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(all_ops(slice(None)), wanted, strict=True))
    assert all(torch.equal(a, b[5:6]) for a, b in zip(all_ops(slice(5, 6)), wanted, strict=True))
    native.ops().set_isa("portable")
    try:
        assert all(torch.equal(a, b) for a, b in zip(all_ops(slice(None)), wanted, strict=True))
    finally:
        native.ops().set_isa("best")


# Drawing


@given(
    st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 2.0, 2.5]), min_size=1, max_size=40),
    st.sampled_from(["portable", "avx2"]),
)
@settings(max_examples=60, deadline=None)
def test_argmax_takes_the_first_of_the_largest(values: list[float], name: str) -> None:
    logits = torch.tensor(values)
    try:
        native.ops().set_isa(name)
    except RuntimeError:
        name = "portable"
    got = int(native.ops().argmax(logits[None])[0])
    native.ops().set_isa("best")
    best = max(values)
    assert native.ops().best(logits) == got
    assert native.ops().best(torch.stack([logits, logits + 1], 1)[:, 0]) == got  # of any stride
    assert got == (-1 if best == -math.inf else values.index(best)) == sample.argmax_reference(logits)


def test_the_best_of_a_long_row(isa: str) -> None:
    logits = torch.zeros(5000)
    logits[1500] = logits[3000] = 1.0
    assert native.ops().best(logits) == 1500
    logits[4999] = 1.5
    assert native.ops().best(logits) == 4999
    logits[2100] = torch.nan
    assert native.ops().best(logits) == -1


@pytest.mark.parametrize(
    "values", [[1.0, math.nan, 0.0], [math.inf, 1.0], [-math.inf] * 3, [], [0.0] * 20 + [math.nan]]
)
def test_logits_that_are_no_distribution_are_an_error(values: list[float]) -> None:
    logits = torch.tensor(values)
    with pytest.raises(NonFiniteError):
        sample.argmax(logits)
    with pytest.raises(NonFiniteError):
        sample.sample_min_p(logits, temperature=1.0, min_p=0.1, u=0.5)
    assert sample.argmax_reference(logits) == -1
    assert sample.sample_min_p_reference(logits, temperature=1.0, min_p=0.1, u=0.5) == -1


@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 300),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    u=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=80, deadline=None)
def test_sample_min_p_equals_the_reference(seed: int, count: int, temperature: float, min_p: float, u: float) -> None:
    logits = random((count,), scale=3.0, seed=seed)
    logits[:: 1 + seed % 7] = -math.inf
    logits[seed % count] = 1.0
    wanted = sample.sample_min_p_reference(logits, temperature=temperature, min_p=min_p, u=u)
    assert sample.sample_min_p(logits, temperature=temperature, min_p=min_p, u=u) == wanted


def test_sample_min_p_inverts_the_exact_distribution(isa: str) -> None:
    """On a fine grid of u every token gets its probability, the excluded ones none."""
    logits = torch.tensor([0.3, -2.0, 1.7, -math.inf, 1.7, 0.9, -9.0])
    weights = (logits.double() / 0.8).softmax(0)
    kept = torch.where(weights >= 0.05 * weights.max(), weights, 0.0)
    draws = 4000
    counts = torch.zeros(7, dtype=torch.double)
    for i in range(draws):
        counts[native.ops().sample_min_p(logits, 0.8, 0.05, (i + 0.5) / draws)] += 1
    assert (counts / draws - kept / kept.sum()).abs().max() <= 1 / draws
    assert counts[kept == 0].sum() == 0 and (kept == 0).sum() == 3


@given(
    seed=st.integers(0, 1000), count=st.integers(1, 2500), banned=st.sets(st.integers(0, 2499), max_size=9),
    u=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_banned_tokens_are_as_good_as_removed(seed: int, count: int, banned: set[int], u: float) -> None:
    logits = random((count,), scale=3.0, seed=seed)
    ids = sorted(token % count for token in banned)
    ids = sorted({*ids, int(logits.argmax())})
    removed = logits.clone()
    removed[ids] = -math.inf
    wanted = sample.sample_min_p_reference(removed, temperature=1.3, min_p=0.01, u=u)
    assert native.ops().draw(logits, 1.3, 0.01, u, ids) == wanted
    assert native.ops().draw(logits, 0.0, 0.0, 0.0, ids) == sample.argmax_reference(removed)
    if wanted >= 0:
        assert sample.sample_min_p(logits, temperature=1.3, min_p=0.01, u=u, banned=ids) == wanted
        assert sample.argmax(logits, ids) == sample.argmax_reference(removed)
    logits[ids[0]] = math.nan  # says that the others are in doubt
    assert native.ops().draw(logits, 1.3, 0.01, u, ids) == native.ops().draw(logits, 0.0, 0.0, 0.0, ids) == -1


def test_a_quantile_on_a_boundary_takes_the_next_token() -> None:
    logits = torch.zeros(4)
    for u, wanted in ((0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1 - 2**-53, 3)):
        assert sample.sample_min_p(logits, temperature=1.0, min_p=0.0, u=u) == wanted
        assert sample.sample_min_p_reference(logits, temperature=1.0, min_p=0.0, u=u) == wanted


def test_a_large_vocabulary_draws_the_edges() -> None:
    logits = random((128_256,), scale=2.0)
    for u in (0.0, 0.5, 1 - 2**-53):
        wanted = sample.sample_min_p_reference(logits, temperature=1.0, min_p=0.0, u=u)
        assert sample.sample_min_p(logits, temperature=1.0, min_p=0.0, u=u) == wanted


# Refusals say what came and what was wanted


def test_refusals_say_what_came() -> None:
    ops, x = native.ops(), random((4, 8))
    with pytest.raises(RuntimeError, match=r"weight must have shape \(8\), got Float \(7\)"):
        ops.rms_norm(x, torch.ones(7), 1e-6, 0.0)
    with pytest.raises(RuntimeError, match=r"weight must be .* dtype Float, got Double \(8\)"):
        ops.rms_norm(x, torch.ones(8).double(), 1e-6, 0.0)
    with pytest.raises(RuntimeError, match="Float, Half or BFloat16, got Int"):
        ops.rms_norm(x.int(), torch.ones(8), 1e-6, 0.0)
    with pytest.raises(RuntimeError, match="not contiguous"):
        ops.rms_norm(x.t(), torch.ones(4), 1e-6, 0.0)
    with pytest.raises(RuntimeError, match="same shape"):
        ops.gated(x, x[:3], "silu")
    with pytest.raises(RuntimeError, match="the dtype of gate"):
        ops.gated(x, x.half(), "silu")
    with pytest.raises(RuntimeError, match="head_dim of q must be at least 16"):
        ops.rope_(x.view(4, 1, 8), x.view(4, 1, 8), torch.ones(4, 8), torch.ones(4, 8))
    with pytest.raises(RuntimeError, match=r"k must have shape \(1, 2, 4\)"):
        ops.append_kv(x, x, torch.ones(1, 8, 2, 4), torch.ones(1, 8, 2, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="temperature > 0"):
        ops.sample_min_p(x[0], 0.0, 0.1, 0.5)
