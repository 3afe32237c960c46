"""What `resolve` refuses: unknown things by name, impossible numbers with key and value."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.config import SUPPORTED, resolve
from exl_runtime.errors import ConfigError, ExlError, UnsupportedModel

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
GEMMA3 = {**GOOD, "architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "hidden_act": None}
MOE = {**GOOD, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def family(name: str, **options: Any) -> dict[str, Any]:
    return {**GOOD, "architectures": [name], **options}


def scaling(**values: Any) -> dict[str, Any]:
    return {**GOOD, "rope_scaling": values}


UNSUPPORTED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (family("FalconForCausalLM"), ("FalconForCausalLM", *SUPPORTED)),
    (family("LlamaForSequenceClassification"), ("LlamaForSequenceClassification",)),
    ({**GOOD, "hidden_act": "quick_gelu"}, ("quick_gelu", "hidden_act", "silu")),
    ({**GEMMA3, "hidden_activation": "mish"}, ("mish", "hidden_activation")),
    (scaling(rope_type="mrope", mrope_section=[1, 2]), ("mrope",)),
    (scaling(type="proportional", factor=2.0), ("proportional",)),
    (scaling(rope_type="default", mrope_section=[1, 2]), ("mrope_section",)),
    (scaling(rope_type="yarn", factor=2.0, llama_4_scaling_beta=0.1), ("llama_4_scaling_beta",)),
    (scaling(type="dynamic", factor=1.0, alpha=1000.0), ("alpha", "dynamic")),
    ({**GOOD, "partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
    ({**GOOD, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("rope_parameters", "layer type")),
    ({**GOOD, "layer_types": ["sliding_attention"] * 4}, ("different types", "LlamaForCausalLM")),
    (family("MistralForCausalLM", layer_types=["sliding_attention", "full_attention"] * 2), ("different types",)),
    (family("Qwen2ForCausalLM", layer_types=["linear_attention"] * 4), ("linear_attention",)),
    (family("MistralForCausalLM", attention_bias=True), ("attention_bias", "MistralForCausalLM")),
    (family("Phi3ForCausalLM", attention_bias=True), ("attention_bias", "Phi3ForCausalLM")),
    (family("Qwen2ForCausalLM", mlp_bias=True), ("mlp_bias",)),
    ({**GEMMA3, "use_bidirectional_attention": True}, ("use_bidirectional_attention", "true")),
    ({**GEMMA3, "attn_logit_softcapping": 50.0}, ("attn_logit_softcapping", "50")),
    ({**GOOD, "rope_interleaved": True}, ("rope_interleaved",)),
    ({**GOOD, "is_causal": False}, ("is_causal", "false")),
    ({**GOOD, "clip_qkv": 8.0}, ("clip_qkv",)),
]

WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ("architectures",)),
    ({**GOOD, "architectures": None}, ("architectures",)),
    ({**GOOD, "architectures": "LlamaForCausalLM"}, ("architectures",)),
    ({**GOOD, "architectures": [3]}, ("architectures",)),
    *[
        ({**GOOD, key: value}, (key, shown))
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "head_dim",
        )
        for value, shown in (
            (0, "0"),
            (-4, "-4"),
            (True, "true"),
            (4.0, "4.0"),
            ("4", "'4'"),
            ([4], "[4]"),
            (10**30, "10000"),
        )
    ],
    *[
        ({key: value for key, value in GOOD.items() if key != gone}, (gone, "missing"))
        for gone in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ],
    ({**GOOD, "num_hidden_layers": 1001}, ("num_hidden_layers", "1001", "1000")),
    ({**GOOD, "vocab_size": 2**24 + 1}, ("vocab_size", "16777216")),
    ({**GOOD, "num_key_value_heads": 3}, ("num_attention_heads", "(4)", "num_key_value_heads", "(3)")),
    ({**GOOD, "hidden_size": 66}, ("hidden_size", "66", "num_attention_heads")),
    ({**GOOD, "head_dim": 15}, ("15", "even")),
    (family("Phi3ForCausalLM", partial_rotary_factor=0.2), ("3 of 16", "even")),
    (family("Phi3ForCausalLM", partial_rotary_factor=1.5), ("partial_rotary_factor", "1.5")),
    ({**GOOD, "rms_norm_eps": 0}, ("rms_norm_eps", "0")),
    ({**GOOD, "rms_norm_eps": -1e-5}, ("rms_norm_eps",)),
    ({**GOOD, "rms_norm_eps": float("inf")}, ("rms_norm_eps", "inf")),
    ({**GOOD, "rms_norm_eps": float("nan")}, ("rms_norm_eps", "nan")),
    ({**GOOD, "rms_norm_eps": "1e-5"}, ("rms_norm_eps", "1e-5")),
    ({**GOOD, "rms_norm_eps": 10**400}, ("rms_norm_eps",)),
    ({**GOOD, "rope_theta": 0}, ("rope_theta", "0")),
    ({**GOOD, "rope_theta": "big"}, ("rope_theta", "big")),
    ({**GOOD, "hidden_act": 3}, ("hidden_act", "3")),
    ({**GOOD, "attention_bias": 1}, ("attention_bias", "1")),
    ({**GOOD, "tie_word_embeddings": "yes"}, ("tie_word_embeddings", "yes")),
    ({**GOOD, "eos_token_id": "2"}, ("eos_token_id", "'2'")),
    ({**GOOD, "eos_token_id": [2, None]}, ("eos_token_id",)),
    ({**GOOD, "eos_token_id": -5}, ("eos_token_id", "-5")),
    ({**GOOD, "bos_token_id": [1]}, ("bos_token_id", "[1]")),
    ({**GOOD, "rope_scaling": 4.0}, ("rope_scaling", "4.0")),
    ({**GOOD, "rope_scaling": ["linear"]}, ("rope_scaling",)),
    (scaling(factor=2.0), ("rope_scaling", "factor", "rope_type")),
    (scaling(rope_type=7), ("rope_type", "7")),
    (scaling(rope_type="linear"), ("rope_scaling", "factor", "missing")),
    (scaling(rope_type="linear", factor=0), ("factor", "0")),
    (scaling(rope_type="linear", factor=True), ("factor", "true")),
    (scaling(**{**LLAMA3, "high_freq_factor": 1.0}), ("high_freq_factor", "low_freq_factor")),
    (scaling(**{**LLAMA3, "original_max_position_embeddings": 0}), ("original_max_position_embeddings", "0")),
    (scaling(**{**LLAMA3, "original_max_position_embeddings": 64.0}), ("original_max_position_embeddings", "64.0")),
    (scaling(**{**LONG, "short_factor": [1.0] * 7}), ("short_factor", "list of 7", "8 numbers")),
    (scaling(**{**LONG, "long_factor": [1.0] * 7 + [None]}), ("long_factor",)),
    (scaling(**{**LONG, "long_factor": [1.0] * 7 + [-1]}), ("long_factor",)),
    (scaling(rope_type="longrope", short_factor=[1.0] * 8), ("long_factor", "missing")),
    (scaling(rope_type="yarn", factor=4.0, beta_fast=1, beta_slow=32), ("beta_fast", "beta_slow")),
    (scaling(rope_type="yarn", factor=4.0, truncate="no"), ("truncate", "no")),
    (scaling(rope_type="yarn", factor=4.0, rope_theta=1.0), ("rope_theta", "1")),
    (scaling(rope_type="yarn", factor=4.0, attention_factor=-1), ("attention_factor", "-1")),
    (
        {**scaling(rope_type="linear", factor=2.0), "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        ("rope_scaling", "rope_parameters", "factor"),
    ),
    ({**GEMMA3, "rope_parameters": {"rope_type": "linear", "factor": 8.0}}, ("full_attention", "sliding_attention")),
    ({**GEMMA3, "sliding_window": None}, ("sliding_window",)),
    ({**GEMMA3, "sliding_window": 0}, ("sliding_window", "0")),
    ({**GEMMA3, "sliding_window_pattern": 0}, ("sliding_window_pattern", "0")),
    ({**GEMMA3, "layer_types": ["full_attention"]}, ("layer_types", "1", "4")),
    ({**GEMMA3, "layer_types": "full_attention"}, ("layer_types",)),
    ({**GEMMA3, "query_pre_attn_scalar": 0}, ("query_pre_attn_scalar", "0")),
    ({**GEMMA3, "final_logit_softcapping": 0}, ("final_logit_softcapping", "0")),
    (family("Qwen2ForCausalLM", layer_types=["sliding_attention"] * 4), ("sliding_window",)),
    (family("Qwen2ForCausalLM", use_sliding_window="true"), ("use_sliding_window", "true")),
    (family("Gemma3ForConditionalGeneration"), ("text_config",)),
    (family("Gemma3ForConditionalGeneration", text_config=[1]), ("text_config", "[1]")),
    (family("Gemma3ForConditionalGeneration", text_config={"hidden_size": -1}), ("text_config", "hidden_size", "-1")),
    ({**MOE, "num_experts_per_tok": 5}, ("num_experts_per_tok", "5", "4")),
    ({**MOE, "num_experts": -1}, ("num_experts", "-1")),
    ({**MOE, "decoder_sparse_step": 0}, ("decoder_sparse_step", "0")),
    ({**MOE, "mlp_only_layers": ["0"]}, ("mlp_only_layers", "0")),
    ({**MOE, "norm_topk_prob": 1}, ("norm_topk_prob", "1")),
    (family("MixtralForCausalLM", num_local_experts=0), ("num_local_experts", "0")),
]


def label(case: tuple[dict[str, Any], tuple[str, ...]]) -> str:
    return " ".join(case[1])[:60]


@pytest.mark.parametrize("case", UNSUPPORTED, ids=map(label, UNSUPPORTED))
def test_unsupported_is_named(case: tuple[dict[str, Any], tuple[str, ...]]) -> None:
    config, words = case
    with pytest.raises(UnsupportedModel) as caught:
        resolve(config)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("case", WRONG, ids=map(label, WRONG))
def test_wrong_values_are_named(case: tuple[dict[str, Any], tuple[str, ...]]) -> None:
    config, words = case
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "options",
    [
        {"layer_types": ["full_attention"] * 4},
        {"sliding_window": 16},  # this family has no windows, whatever is written there
        {"rope_scaling": None, "rope_parameters": {}},
        {"head_dim": None, "hidden_act": None, "mlp_bias": None, "rope_interleaved": False, "is_causal": True},
        {"unknown_key": [1, 2], "quantization_config": {"quant_method": "exl2"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": {"type": "default"}},
    ],
)
def test_harmless_options(options: dict[str, Any]) -> None:
    spec, plain = resolve({**GOOD, **options}), resolve(GOOD)
    assert spec == plain


def test_stop_ids_are_joined() -> None:
    """generation_config.json first, then config.json; no id twice; ids that cannot be drawn left out."""
    config = {**GOOD, "eos_token_id": 2}
    assert resolve(config, {"eos_token_id": [7, 2, 9]}).eos_ids == (7, 2, 9)
    assert resolve(config, {"eos_token_id": 7}).eos_ids == (7, 2)
    assert resolve(config, {}).eos_ids == (2,)
    assert resolve({**GOOD, "eos_token_id": [3, 4, 3, 100]}, {"eos_token_id": None}).eos_ids == (3, 4)
    assert resolve(GOOD, {"eos_token_id": 7}).eos_ids == (7,)  # the family's default does not join in
    assert resolve(GOOD).eos_ids == (2,)
    assert resolve({**GOOD, "eos_token_id": None}).eos_ids == ()
    with pytest.raises(ConfigError, match=r'generation_config\.json: "eos_token_id".*true'):
        resolve(GOOD, {"eos_token_id": True})


def test_bos_and_pad() -> None:
    assert resolve({**GOOD, "bos_token_id": 5}, {"bos_token_id": 6}).bos_id == 5
    assert resolve({**GOOD, "pad_token_id": -1}).pad_id is None
    assert resolve({**GOOD, "pad_token_id": 1000}).pad_id is None
    assert resolve(GOOD, {"bos_token_id": 6}).bos_id == 6
    assert resolve({**GOOD, "bos_token_id": None}).bos_id is None


def test_resolving_does_not_edit_its_input() -> None:
    config = {**GEMMA3, "rope_parameters": {"full_attention": {"type": "linear", "factor": 2.0}}}
    before = copy.deepcopy(config)
    resolve(config)
    assert config == before


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([2**31, 10**40, 1e308, float("nan"), -0.5, 0.5, 1.0]),
    st.sampled_from(["", "silu", "yarn", "linear", "llama3", "longrope", "default", "full_attention"]),
    st.lists(st.sampled_from([1.0, 2, "sliding_attention", "full_attention", None]), max_size=4),
)
KEYS = st.sampled_from(
    [*GOOD, "head_dim", "sliding_window", "layer_types", "eos_token_id", "num_experts", "rope_scaling"]
)
ROPE_KEYS = st.sampled_from(["rope_type", "type", "factor", "rope_theta", *LLAMA3, *LONG, "beta_fast", "mscale"])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SUPPORTED),
    st.dictionaries(KEYS, ODD, max_size=3),
    st.dictionaries(ROPE_KEYS, ODD, max_size=4),
    st.sampled_from(["rope_scaling", "rope_parameters", "other"]),
)
def test_anything_resolves_or_is_refused(name: str, odd: dict[str, Any], rope: dict[str, Any], where: str) -> None:
    config = {**family(name), where: rope, **odd, "text_config": {**GOOD, where: rope, **odd}}
    if "architectures" in odd:
        config["architectures"] = [name]
    try:
        spec = resolve(config)
    except ExlError:
        return
    assert spec.heads % spec.kv_heads == 0
    assert all(layer.rope.rotary_dim % 2 == 0 and 0 < layer.rope.rotary_dim <= spec.head_dim for layer in spec.layers)
