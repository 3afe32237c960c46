"""The row kernels of CUDA against float64 and the plain-torch reference, and bitwise over orders of threads."""

import math

import pytest
import torch
from oracles import assert_as_good_as, same_bits

from exl_runtime.errors import UnsupportedModel
from exl_runtime.ops import activation, cuda_small, norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 8), (1, 1), (3, 17), (9, 64), (2, 513), (2, 1031), (3, 0)]  # a warp for each row, a block for each row


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


# RMSNorm


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_as_good_as_torch(card, shape, dtype, out) -> None:
    x, weight = random(shape, dtype, 3.0), random((shape[1],), seed=1)
    on_card = card.on(x, weight)
    got = cuda_small.rms_norm(*on_card, 1e-5, 1.0, dtype=out).cpu()
    assert got.dtype == out and got.shape == x.shape
    naive = norm.rms_norm(x.float(), weight, 1e-5, 1.0).to(out)
    assert_as_good_as(got, naive, normalized(x, weight, 1e-5, 1.0))


@pytest.mark.parametrize("cols", [40, 777])
def test_rms_norm_permutes_what_it_normalized(card, cols) -> None:
    x, weight = random((5, cols)), random((cols,), seed=1)
    order = torch.randperm(cols, generator=torch.Generator().manual_seed(2)).int()
    x, weight, order = card.on(x, weight, order)
    plain = cuda_small.rms_norm(x, weight, 1e-6, 0.0)
    got = cuda_small.rms_norm(x, weight, 1e-6, 0.0, order=order)
    assert torch.equal(got, plain[:, order.long()])


@pytest.mark.parametrize("cols", [9, 700])
def test_rms_norm_survives_extreme_rows_and_keeps_nan_in_its_own(card, cols) -> None:
    x = torch.tensor([[1e30], [1e-30], [0.0], [1.0]]).expand(4, cols).contiguous()
    x[3, 5] = math.nan
    x, weight = card.on(x, torch.ones(cols))
    got = cuda_small.rms_norm(x, weight, 1e-6, 0.0).cpu()
    assert torch.allclose(got[0], torch.ones(cols)) and got[2].eq(0).all() and got[3].isnan().all()
    assert torch.allclose(got[1], torch.full((cols,), 1e-27))


@pytest.mark.parametrize("shape", [(1, 64), (3, 520), (0, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_first_is_adding_and_then_normalizing(card, shape, dtype) -> None:
    x, delta, weight = random(shape), random(shape, dtype, seed=1), random((shape[1],), seed=2)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(3)).int()
    x, delta, weight, order = card.on(x, delta, weight, order)
    apart = x.clone()
    apart.add_(delta)
    wanted = cuda_small.rms_norm(apart, weight, 1e-6, 0.0, order=order, dtype=torch.float16)
    got = cuda_small.add_rms_norm(x, delta, weight, 1e-6, 0.0, order=order, dtype=torch.float16)
    assert same_bits(x, apart) and same_bits(got, wanted)


def test_norms_do_not_depend_on_order_or_neighbours(card) -> None:
    x, delta, weight = card.on(random((11, 600)), random((11, 600), torch.float16, seed=1), random((600,), seed=2))

    def run() -> list[torch.Tensor]:
        stream = x.clone()
        both = cuda_small.add_rms_norm(stream, delta, weight, 1e-6, 0.0, dtype=torch.float16)
        heads = cuda_small.rms_norm(x.view(-1, 24), weight[:24].contiguous(), 1e-6, 0.0)
        return [both, heads]

    together, _ = card.every_order(run)
    for row in (0, 10):
        alone = cuda_small.add_rms_norm(
            x[row : row + 1].clone(), delta[row : row + 1], weight, 1e-6, 0.0, dtype=torch.float16
        )
        assert same_bits(alone[0].cpu(), together[row])


# Gated activations


@pytest.mark.parametrize("name", sorted(activation.ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 7), (5, 64), (2, 257)])
def test_gated_is_as_good_as_torch(card, shape, dtype, name) -> None:
    gate, up = random(shape, dtype, 4.0), random(shape, dtype, seed=1)
    got = cuda_small.gated(*card.on(gate, up), name).cpu()
    oracle = activation.ACTIVATIONS[name](gate.double()) * up.double()
    assert got.dtype == dtype
    assert_as_good_as(got, activation.gated(gate, up, name), oracle)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu"])
def test_activations_are_accurate_over_the_whole_line(card, name) -> None:
    gate = torch.cat([torch.linspace(-30, 30, 6_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, 1e4, 3e38])])
    got = cuda_small.gated(*card.on(gate, torch.ones_like(gate)), name).cpu().double()
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


def test_gated_takes_the_halves_of_a_fused_projection(card) -> None:
    both = card.on(random((6, 90), torch.float16))[0]
    got = cuda_small.gated(both[:, :45], both[:, 45:], "silu")
    assert same_bits(got, cuda_small.gated(both[:, :45].contiguous(), both[:, 45:].contiguous(), "silu"))


def test_gated_keeps_in_float32_what_float16_cannot_hold(card) -> None:
    gate, up = random((6, 300), torch.float16, 4.0), random((6, 300), torch.float16, seed=1)
    gate[1, 7], up[1, 7] = 6e4, 6e4
    gate[4, 0] = math.nan
    gate, up = card.on(gate, up)
    got = card.every_order(lambda: cuda_small.gated(gate, up, "silu", dtype=torch.float32))
    assert got.dtype == torch.float32 and got[1, 7] == 3.6e9
    assert got.isnan().nonzero().tolist() == [[4, 0]]
    plain = cuda_small.gated(gate, up, "silu").cpu()
    assert plain[1, 7] == math.inf and same_bits(got.half().nan_to_num(), plain.nan_to_num())


def test_an_unknown_activation_is_refused(card) -> None:
    x = card.on(torch.ones(1, 2))[0]
    with pytest.raises(UnsupportedModel, match="swish"):
        cuda_small.gated(x, x, "swish")


# Embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 64, 300])
def test_embedding_rows_are_looked_up_and_scaled(card, dtype, cols) -> None:
    table, tokens = random((13, cols), dtype), torch.tensor([0, 12, 5, 5])
    got = cuda_small.embed(*card.on(tokens, table), 2.5).cpu()
    assert same_bits(got, table[tokens].float() * 2.5)
    assert cuda_small.embed(*card.on(tokens[:0], table), 1.0).shape == (0, cols)


def test_a_token_outside_the_table_is_nan_and_touches_nothing(card) -> None:
    table, tokens = random((13, 40)), torch.tensor([-1, 3, 13])
    got = cuda_small.embed(*card.on(tokens, table), 1.0).cpu()
    assert got[[0, 2]].isnan().all() and same_bits(got[1], table[3])


# Refusals


def test_bindings_say_what_came_and_what_was_wanted(card) -> None:
    x, weight, wide = card.on(torch.ones(2, 8), torch.ones(8), torch.ones(7))
    with pytest.raises(RuntimeError, match=r"weight must be Float \(8\).*Float \(7\)"):
        cuda_small.rms_norm(x, wide, 1e-6, 0.0)
    with pytest.raises(RuntimeError, match=r"order must be Int \(8\)"):
        cuda_small.rms_norm(x, weight, 1e-6, 0.0, order=torch.zeros(8, dtype=torch.int64, device=x.device))
    with pytest.raises(RuntimeError, match="y must not be x"):
        card.ops.rms_norm(x, weight, torch.zeros(8, dtype=torch.int32, device=x.device), x, 1e-6, 0.0)
    with pytest.raises(RuntimeError, match="x must be Float, got Half"):
        cuda_small.add_rms_norm(x.half(), x, weight, 1e-6, 0.0, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="tokens must be Long"):
        cuda_small.embed(torch.ones(2, dtype=torch.int32, device=x.device), x, 1.0)
    with pytest.raises(RuntimeError, match="of one shape"):
        cuda_small.gated(x, x[:, :4], "silu")
