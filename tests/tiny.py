"""Tiny random checkpoints of every family, written and run by transformers: the oracle of the model room."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

# head_dim 16 and odd sizes on purpose: nothing here is a power of two by accident except what formats demand.
BASE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """One row: the transformers config class and what differs from BASE."""

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


PHI3_LONG = {"original_max_position_embeddings": 64, "max_position_embeddings": 512}
FAMILIES = (
    Family("llama", "LlamaConfig"),
    Family("llama_bias", "LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    Family("llama_linear", "LlamaConfig", rope("linear", factor=4.0)),
    Family("llama_dynamic", "LlamaConfig", {"max_position_embeddings": 48, **rope("dynamic", factor=2.0)}),
    Family("llama_yarn", "LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    Family(
        "llama3_rope",
        "LlamaConfig",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    Family("mistral", "MistralConfig", {"sliding_window": 24}),
    Family("mixtral", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    Family("qwen2", "Qwen2Config"),
    Family("qwen2_window", "Qwen2Config", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    Family("qwen3", "Qwen3Config", {"head_dim": 24}),
    Family(
        "qwen3_moe",
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    Family("gemma2", "Gemma2Config", {"head_dim": 24, "sliding_window": 16, "query_pre_attn_scalar": 20}),
    Family(
        "gemma3",
        "Gemma3TextConfig",
        {"head_dim": 24, "sliding_window": 16, "query_pre_attn_scalar": 20, "num_hidden_layers": 7},
    ),
    Family("phi3", "Phi3Config", {"sliding_window": 40}),
    Family(
        "phi3_longrope",
        "Phi3Config",
        {
            **PHI3_LONG,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.5 * i for i in range(8)],
            },
        },
    ),
)


def by_name(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def model_of(family: Family, seed: int = 0) -> Any:
    """A transformers model with weights large enough that every term of the computation matters."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**{**BASE, **family.options})
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.2 / parameter.shape[-1] ** 0.5))
    return model.eval()


@cache
def _written(name: str, root: Path) -> Path:
    folder = root / name
    model_of(by_name(name)).save_pretrained(folder, safe_serialization=True)
    return folder


def write(family: Family, root: Path) -> Path:
    """The checkpoint folder of `family` below `root`, written once per root."""
    return _written(family.name, root)


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """float32 (tokens, vocab), one full forward pass."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()
