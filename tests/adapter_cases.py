"""One adapter of every kind that peft writes, written by hand, and what it makes of a transformers model's parameters.

Everything an adapter does is a change of parameters: a case knows the new ones in float64. In
tests/model/test_lora_peft.py peft agrees.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA = 4, 6
PREFIX = "base_model.model."


@dataclass
class Made:
    """config: adapter_config.json; tensors: adapter_model.safetensors; after: parameter -> its new value, float64."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    after: dict[str, Tensor]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {PREFIX + name: t.contiguous() for name, t in self.tensors.items()}, folder / "adapter_model.safetensors"
        )
        values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "task_type": "CAUSAL_LM"}
        (folder / "adapter_config.json").write_text(json.dumps({**values, **self.config}))
        return folder


class Maker:
    """Random changes of the modules of one model."""

    def __init__(self, model: Any, seed: int) -> None:
        self.parameters = {name: p.detach().double() for name, p in model.state_dict().items()}
        self.generator = torch.Generator().manual_seed(seed)
        self.made = Made({}, {}, {})

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def thin(self, inputs: int, outputs: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
        """A and B; B A has about half the size of the tiny models' weights."""
        return self.random(rank, inputs), self.random(outputs, rank) * (0.6 / (rank * inputs) ** 0.5) * (RANK / ALPHA)

    def value(self, name: str) -> Tensor:
        return self.made.after.get(name, self.parameters[name])

    def lora(self, path: str, *, dora: bool = False, scale: float = ALPHA / RANK, rank: int = RANK) -> None:
        weight = self.value(f"{path}.weight")
        a, b = self.thin(weight.shape[1], weight.shape[0], rank)
        self.made.tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        weight = weight + scale * (b.double() @ a.double())
        if dora:
            norm = weight.norm(dim=1)
            magnitude = (norm * (1 + 0.3 * self.random(len(norm)))).float()
            self.made.tensors[f"{path}.lora_magnitude_vector"] = magnitude
            weight = weight * (magnitude.double() / norm)[:, None]
        self.made.after[f"{path}.weight"] = weight

    def bias(self, path: str, stored: str, scale: float | None = None) -> None:
        """A bias that is added `scale` times, or without one takes the place of the old."""
        old = self.parameters[f"{path}.bias"]
        new = self.random(len(old)) * 0.3
        self.made.tensors[f"{path}.{stored}"] = new
        self.made.after[f"{path}.bias"] = new.double() if scale is None else old + scale * new.double()

    def whole(self, path: str) -> None:
        new = self.random(*self.parameters[f"{path}.weight"].shape) * 0.15
        self.made.tensors[f"{path}.weight"] = new
        self.made.after[f"{path}.weight"] = new.double()

    def table(self, path: str, *, dora: bool = False) -> None:
        weight = self.parameters[f"{path}.weight"]
        a, b = self.thin(*weight.shape)
        self.made.tensors |= {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
        self.made.tensors[f"{path}.base_layer.weight"] = weight.float()
        weight = weight + ALPHA / RANK * (b.double() @ a.double()).t()
        if dora:
            norm = weight.norm(dim=0)
            magnitude = (norm * (1 + 0.3 * self.random(len(norm)))).float()
            self.made.tensors[f"{path}.lora_magnitude_vector"] = magnitude
            weight = weight * (magnitude.double() / norm)
        self.made.after[f"{path}.weight"] = weight

    def tokens(self, path: str, ids: list[int], *also: str) -> None:
        new = self.random(len(ids), self.parameters[f"{path}.weight"].shape[1]) * 0.4
        self.made.tensors[f"{path}.token_adapter.trainable_tokens_delta"] = new
        for name in (path, *also):
            weight = self.parameters[f"{name}.weight"].clone()
            weight[ids] = new.double()
            self.made.after[f"{name}.weight"] = weight

    def stack(self, module: str, parameter: str, inner: str, rank: int, scale: float) -> None:
        """All experts of a 3-D parameter (experts, out, in)."""
        weight = self.parameters[f"{module}.{parameter}"]
        experts, outputs, inputs = weight.shape
        pairs = [self.thin(inputs, outputs, rank) for _ in range(experts)]
        self.made.tensors[f"{module}{inner}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        self.made.tensors[f"{module}{inner}.lora_B.weight"] = torch.stack([b for _, b in pairs], -1).flatten(1)
        added = torch.stack([b.double() @ a.double() for a, b in pairs])
        self.made.after[f"{module}.{parameter}"] = weight + scale * added

    def expert(self, module: str, name: str, parameter: str, expert: int, rows: slice) -> None:
        """One matrix of one expert, as transformers 4 called it."""
        weight = self.value(f"{module}.{parameter}").clone()
        a, b = self.thin(weight.shape[2], weight[expert, rows].shape[0])
        self.made.tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        weight[expert, rows] += ALPHA / RANK * (b.double() @ a.double())
        self.made.after[f"{module}.{parameter}"] = weight


Q, DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"


def _dora(m: Maker) -> None:
    m.made.config |= {"use_dora": True, "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]}
    for layer in range(3):
        for path in (Q, DOWN, "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.gate_proj"):
            m.lora(path.format(layer), dora=True)
    m.lora(HEAD, dora=True)


def _dora_root(m: Maker) -> None:
    m.made.config |= {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    m.made.config |= {"rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {".*q_proj": 3}}
    m.made.config |= {"layers_to_transform": [0, 1], "fan_in_fan_out": True}
    for layer in (0, 1):
        rank = 2 if layer else RANK
        m.lora(Q.format(layer), dora=True, scale=3 / RANK**0.5)
        m.lora(DOWN.format(layer), dora=True, scale=ALPHA / math.sqrt(rank), rank=rank)


def _dora_fused(m: Maker) -> None:
    m.made.config |= {"use_dora": True, "target_modules": ["qkv_proj", "gate_up_proj"]}
    for layer in range(3):
        m.lora(f"model.layers.{layer}.self_attn.qkv_proj", dora=True)
        m.lora(f"model.layers.{layer}.mlp.gate_up_proj", dora=True)


def _adapted_biases(m: Maker) -> None:
    m.made.config |= {"lora_bias": True, "target_modules": ["q_proj", "down_proj", "up_proj"]}
    for path in (Q, DOWN, "model.layers.{}.mlp.up_proj"):
        m.lora(path.format(1))
        m.bias(path.format(1), "lora_B.bias", ALPHA / RANK)
    m.made.config["layers_to_transform"] = [1]


def _own_biases(m: Maker) -> None:
    m.made.config |= {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]}
    for layer in range(3):
        for path in (Q, DOWN):
            m.lora(path.format(layer))
            m.bias(path.format(layer), "base_layer.bias")


def _all_biases(m: Maker) -> None:
    m.made.config |= {"bias": "all", "use_dora": True, "target_modules": ["q_proj"]}
    for layer in range(3):
        m.lora(Q.format(layer), dora=True)
        m.bias(Q.format(layer), "base_layer.bias")
        for part in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
            m.bias(f"model.layers.{layer}.{part}", "bias")
        m.bias(DOWN.format(layer), "bias")


def _whole(m: Maker) -> None:
    m.made.config |= {"modules_to_save": ["embed_tokens", "lm_head", "down_proj"], "target_modules": ["q_proj"]}
    for layer in range(3):
        m.lora(Q.format(layer))
        m.whole(DOWN.format(layer))
    m.whole(EMBED)
    m.whole(HEAD)


def _whole_table(m: Maker) -> None:
    """A tied head keeps the old table, as it does in peft."""
    m.made.config |= {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}
    for layer in range(3):
        m.lora(Q.format(layer))
    m.whole(EMBED)


def _table(m: Maker) -> None:
    m.made.config |= {"target_modules": ["embed_tokens", "lm_head"]}
    m.table(EMBED)
    m.lora(HEAD)
    m.made.tensors[f"{HEAD}.base_layer.weight"] = m.parameters[f"{HEAD}.weight"].float()


def _dora_table(m: Maker) -> None:
    m.made.config |= {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}
    m.table(EMBED, dora=True)
    for layer in range(3):
        m.lora(Q.format(layer), dora=True)


def _tokens(m: Maker) -> None:
    m.made.config |= {"trainable_token_indices": {"embed_tokens": [14, 7, 100], "lm_head": [9, 33]}}
    m.made.config |= {"target_modules": ["q_proj"]}
    for layer in range(3):
        m.lora(Q.format(layer))
    m.tokens(EMBED, [14, 7, 100])
    m.tokens(HEAD, [9, 33])


def _tied_tokens(m: Maker) -> None:
    m.made.config |= {"trainable_token_indices": [14, 7, 100], "target_modules": ["q_proj"]}
    for layer in range(3):
        m.lora(Q.format(layer))
    m.tokens(EMBED, [14, 7, 100], HEAD)


def _stacks(m: Maker) -> None:
    m.made.config |= {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"]}
    m.made.config |= {
        "rank_pattern": {r".*\.gate_up_proj": 2 * RANK},
        "alpha_pattern": {r".*\.gate_up_proj": 3 * ALPHA, "mlp.gate.weight": 9},
    }
    for layer in range(3):
        room = f"model.layers.{layer}.mlp"
        m.lora(Q.format(layer))
        if f"{room}.experts.down_proj" in m.parameters:  # not every layer needs to be a mixture
            m.stack(f"{room}.experts", "gate_up_proj", ".base_layer", 2 * RANK, 3 * ALPHA / (2 * RANK))
            m.stack(f"{room}.experts", "down_proj", "", RANK, ALPHA / RANK)
            m.lora(f"{room}.gate", scale=9 / RANK)


def _experts(m: Maker) -> None:
    m.made.config |= {"target_modules": ["w1", "w2", "w3", "gate"]}
    for layer in range(3):
        module, room = f"model.layers.{layer}.mlp.experts", f"model.layers.{layer}.block_sparse_moe"
        inner = m.parameters[f"{module}.down_proj"].shape[2]
        for expert in (0, 3):
            m.expert(module, f"{room}.experts.{expert}.w1", "gate_up_proj", expert, slice(inner))
            m.expert(module, f"{room}.experts.{expert}.w3", "gate_up_proj", expert, slice(inner, None))
            m.expert(module, f"{room}.experts.{expert}.w2", "down_proj", expert, slice(None))
        m.lora(f"model.layers.{layer}.mlp.gate")
        for half in ("A", "B"):
            moved = m.made.tensors.pop(f"model.layers.{layer}.mlp.gate.lora_{half}.weight")
            m.made.tensors[f"{room}.gate.lora_{half}.weight"] = moved


# name -> (family in tests/tiny.py, what it does)
CASES: dict[str, tuple[str, Callable[[Maker], None]]] = {
    "dora": ("llama", _dora),
    "dora with rslora, patterns and layers": ("llama", _dora_root),
    "dora of fused modules": ("phi3", _dora_fused),
    "dora of an embedding": ("gemma2", _dora_table),
    "biases of lora_B": ("llama_bias", _adapted_biases),
    "biases of adapted modules": ("llama_bias", _own_biases),
    "all biases": ("llama_bias", _all_biases),
    "whole modules": ("llama", _whole),
    "a whole table under a tied head": ("llama_bias", _whole_table),
    "an embedding and the head": ("llama", _table),
    "single tokens": ("llama", _tokens),
    "single tokens of a tied head": ("llama_bias", _tied_tokens),
    "stacked experts and routers": ("mixtral", _stacks),
    "stacked experts beside dense layers": ("qwen3_moe", _stacks),
    "experts one by one": ("mixtral", _experts),
}
# What transformers 5 cannot load any more because its modules are called otherwise: peft has no say there.
OLD_NAMES = ("experts one by one",)


def made(name: str, model: Any, seed: int = 5) -> Made:
    """The adapter of a case, for a transformers model of its family."""
    maker = Maker(model, seed)
    CASES[name][1](maker)
    return maker.made


def changed(model: Any, parts: list[tuple[Made, float]]) -> Any:
    """The model in float64, with weight times what each adapter makes of its parameters. Unties the head."""
    model = model.double()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        before = {name: p.clone() for name, p in model.named_parameters()}
        for made_, weight in parts:
            for name, value in made_.after.items():
                model.get_parameter(name).add_(value - before[name], alpha=weight)
    return model
