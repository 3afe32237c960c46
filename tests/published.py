"""config.json as real models publish it, cut to the keys that matter or could be stumbled over. Data only."""

from typing import Any


def sizes(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int | None, context: int) -> dict[str, Any]:
    stated = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "initializer_range": 0.02,
        "use_cache": True,
        "transformers_version": "4.40.0",
    }
    return stated if kv is None else {**stated, "num_key_value_heads": kv}


def family(arch: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [arch], "model_type": kind, "torch_dtype": "bfloat16", **more}


LLAMA = family("LlamaForCausalLM", "llama", hidden_act="silu", bos_token_id=1, eos_token_id=2)
LLAMA_3 = {**LLAMA, "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "rms_norm_eps": 1e-5}
LLAMA_3.update(rope_theta=500000.0, bos_token_id=128000, tie_word_embeddings=False)
LLAMA_31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL = family("MistralForCausalLM", "mistral", hidden_act="silu", rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
MIXTRAL = {**MISTRAL, **family("MixtralForCausalLM", "mixtral"), "num_experts_per_tok": 2, "num_local_experts": 8}
MIXTRAL.update(output_router_logits=False, router_aux_loss_coef=0.02, rope_theta=1e6, sliding_window=None)
QWEN2 = family("Qwen2ForCausalLM", "qwen2", hidden_act="silu", rms_norm_eps=1e-6, attention_dropout=0.0)
QWEN2.update(rope_theta=1e6, use_sliding_window=False, bos_token_id=151643, eos_token_id=151645)
QWEN3 = family("Qwen3ForCausalLM", "qwen3", hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False, head_dim=128)
QWEN3.update(rope_theta=1000000, rope_scaling=None, sliding_window=None, use_sliding_window=False)
QWEN3.update(bos_token_id=151643, eos_token_id=151645, attention_dropout=0.0)
QWEN3_MOE = {**QWEN3, **family("Qwen3MoeForCausalLM", "qwen3_moe"), "decoder_sparse_step": 1, "mlp_only_layers": []}
QWEN3_MOE.update(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, router_aux_loss_coef=0.001)
QWEN3_MOE.update(output_router_logits=False)
GEMMA2 = family("Gemma2ForCausalLM", "gemma2", hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")
GEMMA2.update(attention_bias=False, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, rms_norm_eps=1e-6)
GEMMA2.update(bos_token_id=2, eos_token_id=1, pad_token_id=0, sliding_window=4096, cache_implementation="hybrid")
GEMMA2.update(rope_theta=10000.0, query_pre_attn_scalar=256, head_dim=256)
GEMMA3 = family("Gemma3ForCausalLM", "gemma3_text", attention_bias=False, attn_logit_softcapping=None, bos_token_id=2)
GEMMA3.update(final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh", pad_token_id=0)
GEMMA3.update(query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_local_base_freq=10000, rope_scaling=None)
GEMMA3.update(rope_theta=1000000, sliding_window=512, cache_implementation="hybrid")
GEMMA3_VISION = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "vision_use_head": False},
}
GEMMA3_LONG = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
PHI3 = family("Phi3ForCausalLM", "phi3", hidden_act="silu", rms_norm_eps=1e-5, embd_pdrop=0.0, resid_pdrop=0.0)
PHI3.update(auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, attention_bias=False, bos_token_id=1)
PHI3.update(eos_token_id=32000, pad_token_id=32000, rope_theta=10000.0, tie_word_embeddings=False)
PHI3.update(original_max_position_embeddings=4096)


def long_factors(count: int) -> dict[str, Any]:
    """As many as the published lists have; the real ones rise from 1 to about 60."""
    return {
        "short_factor": [1.0 + 0.05 * i for i in range(count)],
        "long_factor": [1.08 + 1.2 * i for i in range(count)],
    }


MODELS: dict[str, dict[str, Any]] = {
    "llama-7b": {
        **LLAMA,
        **sizes(32000, 4096, 11008, 32, 32, None, 2048),
        "architectures": ["LLaMAForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": -1,
        "max_sequence_length": 2048,
        "rms_norm_eps": 1e-6,
    },
    "llama-2-70b": {
        **LLAMA,
        **sizes(32000, 8192, 28672, 80, 64, 8, 4096),
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "_name_or_path": "meta-llama/Llama-2-70b-hf",
        "pad_token_id": 0,
    },
    "vicuna-16k": {
        **LLAMA,
        **sizes(32000, 5120, 13824, 40, 40, 40, 4096),
        "max_sequence_length": 16384,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "yarn-llama-2-64k": {
        **LLAMA,
        **sizes(32000, 4096, 11008, 32, 32, 32, 65536),
        "rms_norm_eps": 1e-5,
        "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
        "rope_scaling": {
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
            "finetuned": True,
        },
    },
    "codellama-7b": {**LLAMA, **sizes(32016, 4096, 11008, 32, 32, 32, 16384), "rope_theta": 1000000},
    "deepseek-coder-6.7b": {
        **LLAMA,
        **sizes(32256, 4096, 11008, 32, 32, 32, 16384),
        "bos_token_id": 32013,
        "eos_token_id": 32021,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000,
        "attention_bias": False,
    },
    "tinyllama": {**LLAMA, **sizes(32000, 2048, 5632, 22, 32, 4, 2048), "rope_scaling": None, "rope_theta": 10000.0},
    "yi-34b": {**LLAMA, **sizes(64000, 7168, 20480, 60, 56, 8, 4096), "rope_theta": 5000000.0, "pad_token_id": 0},
    "smollm2-135m": {
        **LLAMA,
        **sizes(49152, 576, 1536, 30, 9, 3, 8192),
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "llama-3-8b": {**LLAMA_3, **sizes(128256, 4096, 14336, 32, 32, 8, 8192), "eos_token_id": 128009},
    "llama-3.1-8b": {
        **LLAMA_3,
        **sizes(128256, 4096, 14336, 32, 32, 8, 131072),
        "eos_token_id": [128001, 128008, 128009],
        "mlp_bias": False,
        "rope_scaling": LLAMA_31_ROPE,
    },
    "llama-3.2-1b": {
        **LLAMA_3,
        **sizes(128256, 2048, 8192, 16, 32, 8, 131072),
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "mlp_bias": None,
        "rope_scaling": {**LLAMA_31_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "mistral-7b-v0.1": {
        **MISTRAL,
        **sizes(32000, 4096, 14336, 32, 32, 8, 32768),
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "mistral-7b-v0.3": {
        **MISTRAL,
        **sizes(32768, 4096, 14336, 32, 32, 8, 32768),
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "yarn-mistral-128k": {
        **MISTRAL,
        **sizes(32000, 4096, 14336, 32, 32, 8, 32768),
        "max_sequence_length": 131072,
        "rope_scaling": {
            "factor": 16.0,
            "finetuned": True,
            "original_max_position_embeddings": 8192,
            "type": "yarn",
        },
        "sliding_window": 131072,
    },
    "mistral-nemo": {
        **MISTRAL,
        **sizes(131072, 5120, 14336, 40, 32, 8, 131072),
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "mixtral-8x7b": {**MIXTRAL, **sizes(32000, 4096, 14336, 32, 32, 8, 32768)},
    "mixtral-8x22b": {
        **MIXTRAL,
        **sizes(32768, 6144, 16384, 56, 48, 8, 65536),
        "router_jitter_noise": 0.0,
    },
    "qwen1.5-7b": {**QWEN2, **sizes(151936, 4096, 11008, 32, 32, 32, 32768), "max_window_layers": 28},
    "qwen2.5-0.5b": {
        **QWEN2,
        **sizes(151936, 896, 4864, 24, 14, 2, 32768),
        "eos_token_id": 151643,
        "max_window_layers": 24,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
    },
    "qwen2.5-7b-yarn": {
        **QWEN2,
        **sizes(152064, 3584, 18944, 28, 28, 4, 32768),
        "max_window_layers": 28,
        "sliding_window": 131072,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "qwen2.5-7b-1m": {
        **QWEN2,
        **sizes(152064, 3584, 18944, 28, 28, 4, 1010000),
        "rope_theta": 10000000.0,
        "sliding_window": 32768,
        "dual_chunk_attention_config": {
            "chunk_size": 262144,
            "local_size": 8192,
            "original_max_position_embeddings": 262144,
        },
    },
    "deepseek-r1-distill-qwen-7b": {
        **QWEN2,
        **sizes(152064, 3584, 18944, 28, 28, 4, 131072),
        "eos_token_id": 151643,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "use_mrope": False,
    },
    "qwen3-0.6b": {
        **QWEN3,
        **sizes(151936, 1024, 3072, 28, 16, 8, 40960),
        "max_window_layers": 28,
        "tie_word_embeddings": True,
    },
    "qwen3-32b-yarn": {
        **QWEN3,
        **sizes(151936, 5120, 25600, 64, 64, 8, 131072),
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "qwen3-30b-a3b": {
        **QWEN3_MOE,
        **sizes(151936, 2048, 6144, 48, 32, 4, 40960),
        "max_window_layers": 48,
        "moe_intermediate_size": 768,
    },
    "qwen3-235b-a22b": {
        **QWEN3_MOE,
        **sizes(151936, 4096, 12288, 94, 64, 4, 40960),
        "max_window_layers": 94,
        "moe_intermediate_size": 1536,
    },
    "gemma-2-2b": {**GEMMA2, **sizes(256000, 2304, 9216, 26, 8, 4, 8192)},
    "gemma-2-9b": {**GEMMA2, **sizes(256000, 3584, 14336, 42, 16, 8, 8192), "sliding_window_size": 4096},
    "gemma-2-27b": {
        **GEMMA2,
        **sizes(256000, 4608, 36864, 46, 32, 16, 8192),
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
        "_attn_implementation": "eager",
    },
    "gemma-3-1b": {
        **GEMMA3,
        **sizes(262144, 1152, 6912, 26, 4, 1, 32768),
        "eos_token_id": [1, 106],
        "sliding_window_pattern": 6,
    },
    "gemma-3-270m": {
        **GEMMA3,
        **sizes(262144, 640, 2048, 18, 4, 1, 32768),
        "_sliding_window_pattern": 6,
        "eos_token_id": 1,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "use_bidirectional_attention": False,
    },
    "gemma-3-4b": {
        **GEMMA3_VISION,
        "text_config": {
            **GEMMA3_LONG,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
    },
    "gemma-3-27b": {
        **GEMMA3_VISION,
        "text_config": {
            **GEMMA3_LONG,
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "sliding_window": 1024,
        },
    },
    "gemma-3-4b, thetas outside": {
        **GEMMA3_VISION,
        "dtype": "bfloat16",
        "text_config": {
            **sizes(262208, 2560, 10240, 34, 8, 4, 131072),
            "model_type": "gemma3_text",
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_parameters": {
                "full_attention": {"factor": 8.0, "rope_type": "linear"},
                "sliding_attention": {"rope_type": "default"},
            },
            "sliding_window": 1024,
            "_sliding_window_pattern": 6,
        },
    },
    "phi-3-mini-4k": {
        **PHI3,
        **sizes(32064, 3072, 8192, 32, 32, 32, 4096),
        "rope_scaling": None,
        "sliding_window": 2047,
    },
    "phi-3-mini-128k, first release": {
        **PHI3,
        **sizes(32064, 3072, 8192, 32, 32, 32, 131072),
        "rope_scaling": {"type": "su", **long_factors(48)},
        "sliding_window": 262144,
    },
    "phi-3.5-mini": {
        **PHI3,
        **sizes(32064, 3072, 8192, 32, 32, 32, 131072),
        "rope_scaling": {"type": "longrope", **long_factors(48)},
        "sliding_window": 262144,
    },
    "phi-3-medium-4k": {
        **PHI3,
        **sizes(32064, 5120, 17920, 40, 40, 10, 4096),
        "rope_scaling": None,
        "sliding_window": 2047,
    },
    "phi-4": {
        **PHI3,
        **sizes(100352, 5120, 17920, 40, 40, 10, 16384),
        "bos_token_id": 100257,
        "eos_token_id": 100265,
        "original_max_position_embeddings": 16384,
        "pad_token_id": 100349,
        "rope_scaling": None,
        "rope_theta": 250000,
        "sliding_window": None,
    },
    "phi-4-mini": {
        **PHI3,
        **sizes(200064, 3072, 8192, 32, 24, 8, 131072),
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", **long_factors(48)},
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
}


ATTENTION_FACTOR = {  # the published one carries the YaRN authors' own key, which transformers leaves aside
    **QWEN3,
    **sizes(151936, 4096, 12288, 36, 32, 8, 131072),
    "rope_scaling": {
        "attn_factor": 0.8782488562869419,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_type": "yarn",
    },
}
