"""The configurations that people really open against transformers: real sizes, nothing with weights is built."""

import importlib
import math
from typing import Any

import pytest
import torch
import transformers
from published import ATTENTION_FACTOR, MODELS

from exl_runtime.config import ModelSpec, MoeSpec, resolve
from exl_runtime.config.spec import RopeSpec
from exl_runtime.ops.rope import frequencies


def theirs_of(raw: dict[str, Any]) -> Any:
    """transformers' configuration of the language model; what only its early releases accept is spelled as today."""
    rest = {key: value for key, value in raw.items() if key != "model_type"}
    if (rest.get("rope_scaling") or {}).get("type") == "su":
        rest["rope_scaling"] = {**rest["rope_scaling"], "type": "longrope"}
    for key, unset in (("pad_token_id", -1), ("mlp_bias", None)):
        if rest.get(key, 0) == unset:
            del rest[key]
    return transformers.AutoConfig.for_model(raw["model_type"], **rest).get_text_config()


def windows_of(config: Any) -> list[int | None]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [getattr(config, "sliding_window", None)] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def inv_freq(rope: RopeSpec, length: int) -> torch.Tensor:
    names = frequencies.__kwdefaults__.keys() - {"length"}
    stated = {name: getattr(rope, name) for name in names}
    return frequencies(kind=rope.kind, theta=rope.theta, rotary_dim=rope.rotary_dim, length=length, **stated)


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[ModelSpec, Any]:
    raw = MODELS[request.param]
    return resolve(raw), theirs_of(raw)


def test_numbers(pair: tuple[ModelSpec, Any]) -> None:
    spec, config = pair
    assert spec.vocab_size == config.vocab_size
    assert spec.hidden_size == config.hidden_size
    assert spec.heads == config.num_attention_heads
    assert spec.kv_heads == config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert spec.head_dim == head_dim
    assert spec.norm_eps == config.rms_norm_eps
    assert spec.tied_embeddings == config.tie_word_embeddings
    assert spec.attention_scale == pytest.approx(getattr(config, "query_pre_attn_scalar", head_dim) ** -0.5)
    assert spec.attention_softcap == getattr(config, "attn_logit_softcapping", None)
    assert spec.logit_softcap == getattr(config, "final_logit_softcapping", None)
    assert [layer.window for layer in spec.layers] == windows_of(config)
    for layer in spec.layers:
        if isinstance(layer.mlp, MoeSpec):
            assert layer.mlp.experts == config.num_local_experts
            assert layer.mlp.experts_per_token == config.num_experts_per_tok
            assert layer.mlp.intermediate_size == getattr(config, "moe_intermediate_size", config.intermediate_size)
            assert layer.mlp.normalize_top
        else:
            assert layer.mlp.intermediate_size == config.intermediate_size


def test_ropes(pair: tuple[ModelSpec, Any]) -> None:
    spec, config = pair
    modeling = importlib.import_module(type(config).__module__.replace("configuration", "modeling"))
    rotary = next(cls for name, cls in vars(modeling).items() if name.endswith("RotaryEmbedding"))(config)
    for layer in spec.layers:
        prefix = f"{config.layer_types[layer.index]}_" if isinstance(rotary.rope_type, dict) else ""
        wanted = getattr(rotary, f"{prefix}original_inv_freq")
        assert layer.rope.rotary_dim == 2 * wanted.numel()
        torch.testing.assert_close(inv_freq(layer.rope, 1), wanted, rtol=0, atol=0)
        assert layer.rope.attention_factor == getattr(rotary, f"{prefix}attention_scaling")


STOPS = {
    "llama-7b": (1,),
    "llama-3.1-8b": (128001, 128008, 128009),
    "gemma-3-4b": (1, 106),
    "qwen2.5-0.5b": (151643,),
    "phi-3-mini-4k": (32000,),
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_ids(name: str) -> None:
    assert resolve(MODELS[name]).eos_ids == STOPS[name]


def test_generation_config_adds_stop_ids() -> None:
    """As published: the configuration names one end, generation_config.json the ones that chats need."""
    phi = resolve(MODELS["phi-3-mini-4k"], {"eos_token_id": [32000, 32001, 32007], "pad_token_id": 32000})
    assert phi.eos_ids == (32000, 32001, 32007)
    qwen = resolve(MODELS["qwen1.5-7b"], {"eos_token_id": [151645, 151643], "repetition_penalty": 1.05, "top_k": 20})
    assert qwen.eos_ids == (151645, 151643)
    llama = resolve(MODELS["llama-3-8b"], {"eos_token_id": [128001, 128009], "do_sample": True})
    assert llama.eos_ids == (128001, 128009)


def test_the_factor_of_yarns_authors() -> None:
    """0.878 undoes YaRN's temperature for a factor of 4: the model was trained without it."""
    rope = resolve(ATTENTION_FACTOR).layers[0].rope
    assert rope.attention_factor == pytest.approx(1.0, abs=1e-4)
    plain = {key: value for key, value in ATTENTION_FACTOR["rope_scaling"].items() if key != "attn_factor"}
    scaled = resolve({**ATTENTION_FACTOR, "rope_scaling": plain}).layers[0].rope
    assert scaled.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)


NOTHING = (None, {}, {"type": None}, {"type": None, "factor": None}, {"rope_type": "default"}, {"type": "default"})


@pytest.mark.parametrize("scaling", NOTHING, ids=str)
def test_ways_to_say_that_the_rope_is_plain(scaling: dict[str, Any] | None) -> None:
    rope = resolve({**MODELS["llama-2-70b"], "rope_scaling": scaling}).layers[0].rope
    assert rope == RopeSpec(kind="default", theta=10000.0, rotary_dim=128)


QUANTIZED = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}


@pytest.mark.parametrize("name", ["llama-2-70b", "gemma-3-4b"])
def test_what_quantizers_add_changes_nothing(name: str) -> None:
    raw = MODELS[name]
    assert resolve({**raw, "quantization_config": QUANTIZED, "unsloth_fixed": True, "dtype": "float16"}) == resolve(raw)
