"""Names against what transformers writes: every tensor of a checkpoint is found, once, under its right meaning."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from exl_runtime.checkpoint import Checkpoint
from exl_runtime.config import ModelSpec, MoeSpec, load_config, resolve
from exl_runtime.config.names import EXPERT_PARTS, LINEARS, Source

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION = {
    "text_config": {**SIZES, "head_dim": 8, "model_type": "gemma3_text"},
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "MistralForCausalLM": ("MistralConfig", SIZES),
    "MixtralForCausalLM": ("MixtralConfig", {**SIZES, "num_local_experts": 3}),
    "Qwen2ForCausalLM": ("Qwen2Config", SIZES),
    "Qwen3ForCausalLM": ("Qwen3Config", {**SIZES, "head_dim": 12}),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**SIZES, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [0]},
    ),
    "Gemma2ForCausalLM": ("Gemma2Config", {**SIZES, "head_dim": 8}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**SIZES, "head_dim": 8, "tie_word_embeddings": False}),
    "Gemma3ForConditionalGeneration": ("Gemma3Config", VISION),
    "Phi3ForCausalLM": ("Phi3Config", SIZES),
}
BESIDES = ("vision_tower", "multi_modal_projector")


def model_of(family: str) -> Any:
    torch.manual_seed(1)
    config, options = FAMILIES[family]
    model = getattr(transformers, family)(getattr(transformers, config)(**options))
    with torch.no_grad():  # no two tensors alike, no constant ones
        for parameter in model.parameters():
            parameter.normal_()
    return model


def pick(checkpoint: Checkpoint, sources: tuple[Source, ...]) -> tuple[str, torch.Tensor]:
    """(tensor name, weight (out_features, in_features)) of the first source that exists."""
    for source in sources:
        name = source.path if source.expert is not None else f"{source.path}.weight"
        if checkpoint.has(name):
            weight = checkpoint.tensor(name, row=source.expert)
            assert source.total in (None, weight.shape[0])
            return name, weight[source.start : source.stop]
    raise AssertionError(f"none of {sources} in {sorted(checkpoint.names)}")


def read_all(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Canonical name -> tensor for everything the model needs, and the checkpoint names it came from."""
    found: dict[str, torch.Tensor] = {}
    used: set[str] = set()

    def keep(key: str, sources: tuple[Source, ...]) -> None:
        name, found[key] = pick(checkpoint, sources)
        used.add(name)
        bias = name.removesuffix(".weight") + ".bias"
        if checkpoint.has(bias):
            used.add(bias)

    def plain(key: str, paths: tuple[str, ...]) -> None:
        keep(key, tuple(Source(path) for path in paths))

    names = spec.names
    plain("embedding", names.embedding)
    plain("final_norm", names.final_norm)
    if not spec.tied_embeddings:
        plain("head", names.head)
    kinds = ["input", "pre_mlp"] + ["post_attention", "post_mlp"] * spec.post_norms + ["q", "k"] * spec.qk_norm
    for layer in spec.layers:
        i = layer.index
        for kind in kinds:
            plain(f"{i}.{kind}", names.norm(i, kind))
        sparse = isinstance(layer.mlp, MoeSpec)
        for part in LINEARS[: 4 if sparse else 7]:
            keep(f"{i}.{part}", names.linear(i, part))
        if sparse:
            keep(f"{i}.router", names.router(i))
            for expert in range(layer.mlp.experts):
                for part in EXPERT_PARTS:
                    keep(f"{i}.{expert}.{part}", names.expert_linear(i, expert, part))
    return found, used


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_in_memory_names_reach_every_tensor(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    model.save_pretrained(tmp_path / "saved")
    files = load_config(tmp_path / "saved")
    spec = resolve(files.config, files.generation)
    (tmp_path / "modules").mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if spec.tied_embeddings:
        state.pop("lm_head.weight")
    save_file(state, tmp_path / "modules" / "model.safetensors")

    results = []
    for folder in ("saved", "modules"):
        with Checkpoint.open(tmp_path / folder) as checkpoint:
            found, used = read_all(checkpoint, spec)
            rest = {name for name in checkpoint.names - used if not any(part in name for part in BESIDES)}
            assert not rest, folder
        results.append(found)
    for key, tensor in results[0].items():
        assert torch.equal(tensor, results[1][key]), key
    check_shapes(spec, results[0])
    check_meaning(spec, model, results[0])


def check_shapes(spec: ModelSpec, found: dict[str, torch.Tensor]) -> None:
    wide, narrow, hidden = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.hidden_size
    for layer in spec.layers:
        inner = layer.mlp.intermediate_size
        shapes = {
            "q_proj": (wide, hidden),
            "k_proj": (narrow, hidden),
            "v_proj": (narrow, hidden),
            "o_proj": (hidden, wide),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        for key, tensor in found.items():
            head, _, part = key.rpartition(".")
            if head.split(".")[0] == str(layer.index) and part in shapes:
                assert tuple(tensor.shape) == shapes[part], key


def check_meaning(spec: ModelSpec, model: Any, found: dict[str, torch.Tensor]) -> None:
    """Run single modules of transformers and repeat them with the tensors found: gate is gate, up is up."""
    text = getattr(model.model, "language_model", model.model)
    with torch.inference_mode():
        for layer, block in zip(spec.layers, text.layers, strict=True):
            i, x = layer.index, torch.randn(1, 5, spec.hidden_size)
            if isinstance(layer.mlp, MoeSpec):
                flat = x[0]
                scores = torch.softmax(flat @ found[f"{i}.router"].T, -1)
                top, chosen = scores.topk(layer.mlp.experts_per_token, -1)
                top = top / top.sum(-1, keepdim=True) if layer.mlp.normalize_top else top
                want = block.mlp(x)[0]
                got = torch.zeros_like(want)
                for t in range(5):
                    for weight, e in zip(top[t], chosen[t].tolist(), strict=True):
                        parts = (found[f"{i}.{e}.{part}"] for part in EXPERT_PARTS)
                        got[t] += weight * gated(flat[t], *parts, layer.mlp.activation)
            else:
                for part in EXPERT_PARTS:
                    if (bias := getattr(getattr(block.mlp, part, None), "bias", None)) is not None:
                        bias.zero_()
                want = block.mlp(x)
                got = gated(x, *(found[f"{i}.{part}"] for part in EXPERT_PARTS), layer.mlp.activation)
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-2)
            attention = block.self_attn
            if hasattr(attention, "qkv_proj"):
                split = torch.cat([found[f"{i}.{part}"] for part in LINEARS[:3]])
                assert torch.equal(split, attention.qkv_proj.weight)
            else:
                assert all(torch.equal(found[f"{i}.{p}"], getattr(attention, p).weight) for p in LINEARS[:4])
            assert torch.equal(found[f"{i}.input"], block.input_layernorm.weight)
            before_mlp = block.pre_feedforward_layernorm if spec.post_norms else block.post_attention_layernorm
            assert torch.equal(found[f"{i}.pre_mlp"], before_mlp.weight)
            if spec.post_norms:
                assert torch.equal(found[f"{i}.post_attention"], block.post_attention_layernorm.weight)
                assert torch.equal(found[f"{i}.post_mlp"], block.post_feedforward_layernorm.weight)


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, activation: str) -> torch.Tensor:
    act = torch.nn.functional.silu
    if activation == "gelu_tanh":

        def act(y: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(y, approximate="tanh")

    return (act(x @ gate.T) * (x @ up.T)) @ down.T


def test_the_first_candidate_is_the_split_spelling() -> None:
    """What EXL2 folders use, and what the converter writes."""
    config = {"architectures": ["Phi3ForCausalLM"], **SIZES}
    names = resolve(config).names
    assert names.linear(1, "k_proj")[0] == Source("model.layers.1.self_attn.k_proj")
    assert names.linear(1, "k_proj")[1] == Source("model.layers.1.self_attn.qkv_proj", 32, 48, None, 64)
    assert names.linear(1, "up_proj")[0] == Source("model.layers.1.mlp.up_proj")
    assert names.linear(1, "o_proj") == (Source("model.layers.1.self_attn.o_proj"),)
    assert names.head == ("lm_head",)
