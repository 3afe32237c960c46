"""Rotary embeddings: the same float32 bits as transformers, and the right rotation."""

import itertools
import math

import pytest
import torch
from oracles import same_bits
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from exl_runtime.errors import UnsupportedModel
from exl_runtime.ops.rope import cos_sin, frequencies, rope

ORIGINAL = {"original_max_position_embeddings": 8192}


def config(head_dim: int, theta: float, context: int, **parameters: object) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters={"rope_theta": theta, **parameters},
    )


def theirs(cfg: LlamaConfig, length: int | None = None) -> tuple[torch.Tensor, float]:
    kind = cfg.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(cfg)
    return ROPE_INIT_FUNCTIONS[kind](cfg, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6, 10000])
def test_default_and_linear(head_dim: int, theta: float) -> None:
    expected, _ = theirs(config(head_dim, theta, 4096, rope_type="default"))
    assert same_bits(frequencies(kind="default", theta=theta, rotary_dim=head_dim), expected)
    for factor in (1.0, 2.0, 3.7, 8.0):
        expected, _ = theirs(config(head_dim, theta, 4096, rope_type="linear", factor=factor))
        assert same_bits(frequencies(kind="linear", theta=theta, rotary_dim=head_dim, factor=factor), expected)


@pytest.mark.parametrize(("factor", "context"), list(itertools.product((1.0, 1.3, 2.0, 4.0, 8.5), (1024, 2048, 4097))))
def test_dynamic(factor: float, context: int) -> None:
    cfg = config(64, 10000.0, context, rope_type="dynamic", factor=factor)
    arguments = {"kind": "dynamic", "theta": 10000.0, "rotary_dim": 64, "factor": factor, "original_context": context}
    trained, _ = theirs(cfg)
    for length in (0, 5, context):
        assert same_bits(frequencies(**arguments, length=length), trained)
    for length in (context + 1, 2 * context - 3, 40 * context):
        module = LlamaRotaryEmbedding(cfg)
        positions = torch.arange(length - 3, length)[None]
        cos, sin = module(torch.zeros(1), positions)
        inv_freq = frequencies(**arguments, length=length)
        assert same_bits(inv_freq, module.inv_freq)
        ours = cos_sin(inv_freq, positions[0], 1.0)
        assert same_bits(ours[0], cos[0, :, :32]) and same_bits(ours[1], sin[0, :, :32])


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("beta_fast", "beta_slow"), [(32.0, 1.0), (16.0, 2.0), (4.0, 4.0)])
@pytest.mark.parametrize("factor", [4.0, 40.0, 1.5])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_yarn(truncate: bool, beta_fast: float, beta_slow: float, factor: float, head_dim: int) -> None:
    for theta, original in ((10000.0, 4096), (1e6, 32768), (150000.0, 256), (50.0, 131072)):
        cfg = config(
            head_dim,
            theta,
            int(original * factor),
            rope_type="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            truncate=truncate,
        )
        expected, _ = theirs(cfg)
        ours = frequencies(
            kind="yarn",
            theta=theta,
            rotary_dim=head_dim,
            factor=factor,
            original_context=original,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            truncate=truncate,
        )
        assert same_bits(ours, expected)


def test_yarn_whose_ramp_has_no_width() -> None:
    turns = 4096 / (2 * math.pi)  # both ends of the ramp fall on pair 0
    cfg = config(
        64,
        10000.0,
        8192,
        rope_type="yarn",
        factor=2.0,
        original_max_position_embeddings=4096,
        beta_fast=turns,
        beta_slow=turns,
        truncate=False,
    )
    ours = frequencies(
        kind="yarn",
        theta=10000.0,
        rotary_dim=64,
        factor=2.0,
        original_context=4096,
        beta_fast=turns,
        beta_slow=turns,
        truncate=False,
    )
    assert ours.isfinite().all() and same_bits(ours, theirs(cfg)[0])


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (1.0, 2.0), (0.5, 8.0)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_three_bands(factor: float, low: float, high: float, head_dim: int) -> None:
    cfg = config(
        head_dim,
        500000.0,
        131072,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        **ORIGINAL,
    )
    expected, _ = theirs(cfg)
    ours = frequencies(
        kind="llama3",
        theta=500000.0,
        rotary_dim=head_dim,
        factor=factor,
        original_context=8192,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    assert same_bits(ours, expected)


@pytest.mark.parametrize("partial", [1.0, 0.75])
def test_longrope(partial: float) -> None:
    rotary = int(96 * partial)
    random = torch.Generator().manual_seed(6)
    short = (1 + torch.rand(rotary // 2, generator=random)).tolist()
    long = (1 + 30 * torch.rand(rotary // 2, generator=random)).tolist()
    cfg = Phi3Config(
        hidden_size=4 * 96,
        num_attention_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": short,
            "long_factor": long,
            "partial_rotary_factor": partial,
            "original_max_position_embeddings": 4096,
        },
        pad_token_id=0,
    )
    for length in (0, 1, 4096, 4097, 100000):
        expected, _ = theirs(cfg, length)
        ours = frequencies(
            kind="longrope",
            theta=10000.0,
            rotary_dim=rotary,
            original_context=4096,
            length=length,
            short_factor=short,
            long_factor=tuple(long),
        )
        assert same_bits(ours, expected)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="spiral"):
        frequencies(kind="spiral", theta=1e4, rotary_dim=8)


@pytest.mark.parametrize("attention_factor", [1.0, 1.1902380714238083])
def test_angles_and_rotation_equal_transformers(attention_factor: float) -> None:
    torch.manual_seed(7)
    cfg = config(64, 10000.0, 4096, rope_type="default")
    module = LlamaRotaryEmbedding(cfg)
    module.attention_scaling = attention_factor
    positions = torch.tensor([0, 1, 17, 4095, 100000, 3])
    q, k = torch.randn(6, 8, 64), torch.randn(6, 2, 64)
    cos, sin = module(q, positions[None])
    wanted_q, wanted_k = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    angles = cos_sin(frequencies(kind="default", theta=10000.0, rotary_dim=64), positions, attention_factor)
    ours_q, ours_k = rope(q, k, *angles)
    assert same_bits(ours_q, wanted_q[0]) and same_bits(ours_k, wanted_k[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotary", [16, 24, 32])
def test_partial_rotation_against_complex_numbers(dtype: torch.dtype, rotary: int) -> None:
    torch.manual_seed(8)
    q, k = torch.randn(5, 3, 32).to(dtype), torch.randn(5, 1, 32).to(dtype)
    cos, sin = cos_sin(frequencies(kind="default", theta=100.0, rotary_dim=rotary), torch.arange(5), 1.0)
    turn = torch.complex(cos.double(), sin.double())[:, None]
    for x, turned in zip((q, k), rope(q, k, cos, sin), strict=True):
        assert turned.dtype == dtype
        assert torch.equal(turned[..., rotary:], x[..., rotary:])
        wide = torch.complex(x[..., : rotary // 2].double(), x[..., rotary // 2 : rotary].double()) * turn
        exact = torch.cat([wide.real, wide.imag], dim=-1)
        assert torch.allclose(
            turned[..., :rotary].double(),
            exact,
            rtol=torch.finfo(dtype).eps,
            atol=1e-3 if dtype != torch.float32 else 1e-6,
        )


def test_no_tokens() -> None:
    cos, sin = cos_sin(frequencies(kind="default", theta=100.0, rotary_dim=16), torch.zeros(0, dtype=torch.int64), 1.0)
    q, k = rope(torch.zeros(0, 4, 16), torch.zeros(0, 2, 16), cos, sin)
    assert q.shape == (0, 4, 16) and k.shape == (0, 2, 16)
