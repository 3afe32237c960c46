"""Every family, in both spellings, against the configuration and the model that transformers makes of the same text."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from exl_runtime.config import SUPPORTED, ModelSpec, MoeSpec, RopeSpec, load_config, resolve

SIZES = """"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
 "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-05"""
LLAMA = '"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"'
MISTRAL = '"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"'
MIXTRAL = '"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4'
QWEN2 = '"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"'
QWEN3 = '"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"'
QWEN3_MOE = '"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 16'
GEMMA2 = '"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"'
GEMMA3 = '"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"'
PHI3 = '"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0'
FACTORS = '"short_factor": [1, 1.5, 2.0, 3], "long_factor": [4, 5, 6, 7.5]'

CASES = {
    "llama1": f'{LLAMA}, {SIZES}, "pad_token_id": -1, "bos_token_id": 0, "eos_token_id": 1',
    "llama, no kv heads, tied": f"""{LLAMA}, "tie_word_embeddings": true, "vocab_size": 97, "hidden_size": 48,
        "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6""",
    "llama, every bias, head_dim": f'{LLAMA}, {SIZES}, "attention_bias": true, "mlp_bias": true, "head_dim": 12',
    "llama3.1": f"""{LLAMA}, {SIZES}, "rope_theta": 500000.0, "rope_scaling": {{"factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "llama3"}},
        "eos_token_id": [5, 6, 7]""",
    "llama3.1, v5": f"""{LLAMA}, {SIZES}, "rope_parameters": {{"rope_theta": 500000.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        "rope_type": "llama3"}}""",
    "llama, linear": f'{LLAMA}, {SIZES}, "rope_scaling": {{"type": "linear", "factor": 4.0}}',
    "llama, linear, v5": f"""{LLAMA}, {SIZES},
        "rope_parameters": {{"rope_type": "linear", "factor": 4, "rope_theta": 20000}}""",
    "llama, dynamic": f'{LLAMA}, {SIZES}, "rope_scaling": {{"type": "dynamic", "factor": 2.0}}, "rope_theta": 10000',
    "llama, yarn": f"""{LLAMA}, {SIZES}, "rope_scaling": {{"type": "yarn", "factor": 16.0, "finetuned": true,
        "original_max_position_embeddings": 32}}""",
    "llama, yarn, mscale": f"""{LLAMA}, {SIZES}, "rope_parameters": {{"rope_type": "yarn", "factor": 4.0,
        "rope_theta": 1000.0, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 20, "beta_slow": 2, "truncate": false,
        "original_max_position_embeddings": 32}}""",
    "llama, yarn, attention_factor": f"""{LLAMA}, {SIZES}, "rope_scaling": {{"rope_type": "yarn", "factor": 4.0,
        "attention_factor": 1.25, "original_max_position_embeddings": 64, "beta_fast": null}}""",
    "llama, longrope": f"""{LLAMA}, {SIZES}, "rope_scaling": {{"rope_type": "longrope", {FACTORS}, "factor": 8.0,
        "original_max_position_embeddings": 32}}""",
    "mistral 0.1": f'{MISTRAL}, {SIZES}, "sliding_window": 32, "rope_theta": 10000.0',
    "mistral, window not stated": f"{MISTRAL}, {SIZES}",
    "mistral 0.3": f'{MISTRAL}, {SIZES}, "sliding_window": null, "rope_theta": 1000000.0',
    "mistral nemo, v5": f"""{MISTRAL}, {SIZES}, "sliding_window": null, "head_dim": 10,
        "rope_parameters": {{"rope_theta": 1e6, "rope_type": "default"}}""",
    "mixtral": f'{MIXTRAL}, {SIZES}, "num_experts_per_tok": 2, "rope_theta": 1e6, "sliding_window": null',
    "mixtral, defaults, window": f'{MIXTRAL}, {SIZES}, "sliding_window": 16, "head_dim": null',
    "qwen2": f"""{QWEN2}, {SIZES}, "use_sliding_window": false, "sliding_window": 64, "max_window_layers": 2,
        "rope_theta": 1000000.0, "bos_token_id": 3, "eos_token_id": 4""",
    "qwen2, late windows": f"""{QWEN2}, {SIZES}, "use_sliding_window": true, "sliding_window": 64,
        "max_window_layers": 2, "attention_bias": false""",
    "qwen2, v5": f"""{QWEN2}, {SIZES}, "use_sliding_window": true, "sliding_window": 64, "layer_types":
        ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {{"rope_type": "default", "rope_theta": 1e6}}""",
    "qwen2, yarn": f"""{QWEN2}, {SIZES}, "rope_scaling": {{"factor": 4.0, "type": "yarn",
        "original_max_position_embeddings": 128}}""",
    "qwen3": f'{QWEN3}, {SIZES}, "head_dim": 24, "rope_theta": 1e6, "tie_word_embeddings": true',
    "qwen3, defaults": f'{QWEN3}, {SIZES}, "attention_bias": true',
    "qwen3_moe": f"""{QWEN3_MOE}, {SIZES}, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": true,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "head_dim": 12, "max_window_layers": 4""",
    "qwen3_moe, v5": f"""{QWEN3_MOE}, {SIZES}, "num_local_experts": 6, "num_experts_per_tok": 3,
        "decoder_sparse_step": 2, "mlp_only_layers": [], "use_sliding_window": true, "sliding_window": 20""",
    "gemma2": f"""{GEMMA2}, {SIZES}, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 32,
        "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 40.0""",
    "gemma2, v5": f"""{GEMMA2}, {SIZES}, "head_dim": 12, "attn_logit_softcapping": null,
        "final_logit_softcapping": null, "layer_types": ["full_attention", "sliding_attention", "sliding_attention",
        "full_attention"], "rope_parameters": {{"rope_type": "default", "rope_theta": 9000.0}}""",
    "gemma3": f"""{GEMMA3}, {SIZES}, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 32,
        "sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 5000.0,
        "rope_scaling": {{"factor": 8.0, "rope_type": "linear"}}""",
    "gemma3, v5": f"""{GEMMA3}, {SIZES}, "head_dim": 12, "sliding_window": 32, "layer_types": ["sliding_attention",
        "full_attention", "sliding_attention", "sliding_attention"], "rope_parameters": {{
        "full_attention": {{"rope_type": "linear", "factor": 8.0, "rope_theta": 70000.0}},
        "sliding_attention": {{"rope_type": "default", "rope_theta": 300.0}}}}, "final_logit_softcapping": 9.5""",
    "gemma3, defaults": f'{GEMMA3}, {SIZES}, "head_dim": 12',
    "phi3": f'{PHI3}, {SIZES}, "sliding_window": 40, "rope_scaling": null, "original_max_position_embeddings": 256',
    "phi3, su": f"""{PHI3}, {SIZES}, "rope_scaling": {{"type": "su", {FACTORS},
        "original_max_position_embeddings": 64}}, "original_max_position_embeddings": 64, "attention_bias": false""",
    "phi3, named yarn": f"""{PHI3}, {SIZES}, "rope_scaling": {{"type": "yarn", {FACTORS}, "factor": 1,
        "original_max_position_embeddings": 64}}, "original_max_position_embeddings": 64""",
    "phi3, partial, longrope": f"""{PHI3}, {SIZES}, "partial_rotary_factor": 0.75, "rope_scaling": {{"type": "longrope",
        "short_factor": [1, 2, 3], "long_factor": [4, 5, 6]}}, "original_max_position_embeddings": 128""",
    "phi3, v5": f"""{PHI3}, {SIZES}, "original_max_position_embeddings": 64, "rope_parameters": {{
        "rope_type": "longrope", "rope_theta": 7000.0, "partial_rotary_factor": 0.5, "short_factor": [1, 2],
        "long_factor": [4, 5], "original_max_position_embeddings": 64}}""",
    "phi3, partial, plain": f'{PHI3}, {SIZES}, "partial_rotary_factor": 0.5',
}


def folder_of(root: Path, text: str) -> Path:
    (root / "config.json").write_text("{" + text + "}")
    return root


def theirs_of(folder: Path) -> Any:
    """The transformers model of a configuration, with real (tiny) weights, so that buffers have values."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0])(config).eval()


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelSpec, Any]:
    files = load_config(folder_of(tmp_path, CASES[request.param]))
    return resolve(files.config, files.generation), theirs_of(tmp_path)


def frequencies(rope: RopeSpec, length: int) -> torch.Tensor:
    """The papers' formulas in float64; independent of ops/rope.py."""
    dims = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float64) / rope.rotary_dim
    plain = rope.theta**-dims
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "dynamic":
        stretch = rope.factor * max(length, rope.original_context) / rope.original_context - (rope.factor - 1)
        return (rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))) ** -dims
    if rope.kind == "longrope":
        chosen = rope.short_factor if length <= rope.original_context else rope.long_factor
        return plain / torch.tensor(chosen, dtype=torch.float64)
    turns = rope.original_context * plain / (2 * math.pi)  # rotations inside the original context
    if rope.kind == "llama3":
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
    elif rope.kind == "yarn":

        def dim_with(rotations: float) -> float:
            ratio = math.log(rope.original_context / (rotations * 2 * math.pi)) / math.log(rope.theta)
            return rope.rotary_dim / 2 * ratio

        low, high = dim_with(rope.beta_fast), dim_with(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.rotary_dim - 1)
        index = torch.arange(rope.rotary_dim // 2, dtype=torch.float64)
        keep = 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    else:
        return plain
    return plain * keep + plain / rope.factor * (1 - keep)


def test_every_supported_architecture_has_a_case() -> None:
    covered = {json.loads("{" + text + "}")["architectures"][0] for text in CASES.values()}
    assert set(SUPPORTED) - covered == {"Gemma3ForConditionalGeneration"}  # below, in a test of its own


def test_numbers(pair: tuple[ModelSpec, Any]) -> None:
    spec, model = pair
    config = model.config
    assert spec.architecture == config.architectures[0]
    assert spec.vocab_size == config.vocab_size
    assert spec.hidden_size == config.hidden_size
    assert spec.context_length == config.max_position_embeddings
    assert spec.heads == config.num_attention_heads
    assert spec.kv_heads == config.num_key_value_heads
    assert spec.norm_eps == config.rms_norm_eps
    assert len(spec.layers) == config.num_hidden_layers
    assert [layer.index for layer in spec.layers] == list(range(config.num_hidden_layers))
    assert spec.tied_embeddings == config.tie_word_embeddings
    assert spec.tied_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert spec.bos_id == config.bos_token_id
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert spec.eos_ids == tuple(i for i in eos if i is not None and i < spec.vocab_size)
    pad = config.pad_token_id
    assert spec.pad_id == (pad if pad is not None and 0 <= pad < spec.vocab_size else None)
    assert spec.logit_softcap == getattr(config, "final_logit_softcapping", None)
    scale = getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0)
    assert spec.embedding_scale == pytest.approx(scale, rel=1e-12)


def test_layers(pair: tuple[ModelSpec, Any]) -> None:
    spec, model = pair
    config = model.config
    for layer, block in zip(spec.layers, model.model.layers, strict=True):
        attention = block.self_attn
        assert spec.head_dim == attention.head_dim
        assert spec.attention_scale == pytest.approx(attention.scaling, rel=1e-12)
        # Families without layer types give every layer the one mask that the window in the configuration makes.
        window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        assert layer.window == (None if spec.architecture.startswith("Llama") else window)
        if spec.architecture == "Gemma2ForCausalLM":
            assert spec.attention_softcap == attention.attn_logit_softcapping
        else:
            assert spec.attention_softcap is None
        if hasattr(attention, "q_proj"):
            assert spec.qkv_bias == (attention.q_proj.bias is not None) == (attention.v_proj.bias is not None)
        else:
            assert spec.qkv_bias == (attention.qkv_proj.bias is not None)
        assert spec.out_bias == (attention.o_proj.bias is not None)
        assert spec.qk_norm == hasattr(attention, "q_norm")
        assert spec.post_norms == hasattr(block, "post_feedforward_layernorm")
        check_norm_offset(spec, block.input_layernorm)
        check_mlp(layer.mlp, block.mlp, config)


def check_norm_offset(spec: ModelSpec, norm: torch.nn.Module) -> None:
    """A norm whose weight is zero still passes its input through where the offset is 1."""
    with torch.no_grad():
        norm.weight.zero_()
        out = norm(torch.tensor([[3.0] * norm.weight.shape[0]]))
    torch.testing.assert_close(out, torch.full_like(out, spec.norm_weight_offset), rtol=1e-3, atol=1e-3)


def check_mlp(mlp: Any, module: Any, config: Any) -> None:
    inside = torch.linspace(-3, 3, 50)
    function = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
    }[mlp.activation]
    experts = getattr(module, "experts", None)
    assert isinstance(mlp, MoeSpec) == (experts is not None)
    if experts is None:
        assert mlp.intermediate_size == module.down_proj.in_features
        assert mlp.bias == (module.down_proj.bias is not None)
        act = module.activation_fn if hasattr(module, "activation_fn") else module.act_fn
    else:
        assert mlp.experts == experts.num_experts == config.num_local_experts
        assert mlp.experts_per_token == module.gate.top_k
        assert mlp.intermediate_size == experts.intermediate_dim
        assert mlp.normalize_top == getattr(module.gate, "norm_topk_prob", True)
        act = experts.act_fn
    torch.testing.assert_close(act(inside), function(inside), rtol=0, atol=1e-6)


def test_ropes(pair: tuple[ModelSpec, Any]) -> None:
    spec, model = pair
    rotary = model.model.rotary_emb
    for layer in spec.layers:
        prefix = ""
        if isinstance(rotary.rope_type, dict):
            prefix = f"{model.config.layer_types[layer.index]}_"
        kind = rotary.rope_type[prefix[:-1]] if prefix else rotary.rope_type
        assert layer.rope.kind == kind
        freqs = getattr(rotary, f"{prefix}original_inv_freq")
        torch.testing.assert_close(freqs.double(), frequencies(layer.rope, 1), rtol=1e-5, atol=0)
        assert layer.rope.attention_factor == pytest.approx(getattr(rotary, f"{prefix}attention_scaling"), rel=1e-12)
        if layer.rope.depends_on_length:
            longer = layer.rope.original_context + 100
            rotary(torch.zeros(1), torch.arange(longer)[None])
            torch.testing.assert_close(rotary.inv_freq.double(), frequencies(layer.rope, longer), rtol=1e-5, atol=0)


VISION = """"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 60],
 "text_config": {"model_type": "gemma3_text", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 7,
  "vocab_size": 97, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 32},
 "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "image_size": 28,
  "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14}, "mm_tokens_per_image": 1"""


def test_the_text_part_of_a_vision_model(tmp_path: Path) -> None:
    """Published files of this kind leave most of text_config to the defaults of the class."""
    files = load_config(folder_of(tmp_path, VISION))
    spec = resolve(files.config)
    text = theirs_of(tmp_path).model.language_model
    config = text.config
    assert (spec.heads, spec.kv_heads, spec.head_dim) == (8, 4, 256)
    assert spec.heads == config.num_attention_heads
    assert spec.head_dim == config.head_dim
    assert spec.context_length == config.max_position_embeddings
    assert spec.eos_ids == (1, 60)
    assert spec.bos_id == config.bos_token_id
    assert spec.tied_embeddings
    assert [layer.window for layer in spec.layers] == [32] * 5 + [None, 32]
    for layer in spec.layers:
        freqs = getattr(text.rotary_emb, f"{config.layer_types[layer.index]}_inv_freq")
        torch.testing.assert_close(freqs.double(), frequencies(layer.rope, 1), rtol=1e-5, atol=0)
