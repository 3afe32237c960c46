"""LoRA adapters as peft writes them, written by hand, and models they are merged into: the oracle of `model.lora`."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from driving import batch_of, new_cache, run
from safetensors.torch import load_file, save_file

from exl_runtime.model.adapted import Adapted
from exl_runtime.model.batch import Plan
from exl_runtime.model.lora import Mix, mix_of

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


def linears_of(model: Any, wanted: tuple[str, ...] = LINEARS) -> dict[str, tuple[int, int]]:
    """Module path -> (in, out) of a transformers model's matrices with these last names."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in wanted
    }


def write_adapter(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    *,
    rank: int = 5,
    alpha: float = 8,
    seed: int = 0,
    ranks: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    size: float = 0.5,
    infix: str = "",
    **config: Any,
) -> Path:
    """`size`: of what the adapter adds, beside outputs of size 1. ranks: path -> rank, where it is another."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (inputs, outputs) in shapes.items():
        r = (ranks or {}).get(path, rank)
        a = torch.randn(r, inputs, generator=generator) / inputs**0.5
        b = torch.randn(outputs, r, generator=generator) * size / r**0.5 * (rank / alpha)
        tensors[f"base_model.model.{path}.lora_A{infix}.weight"] = a.to(dtype)
        tensors[f"base_model.model.{path}.lora_B{infix}.weight"] = b.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "use_rslora": False, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def merged(model: Any, parts: list[tuple[Path, float]], scales: dict[str, float] | None = None) -> Any:
    """The model in float64 with adapters merged in; `scales`: path -> scale, where it is not alpha / r."""
    model = model.double()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for folder, weight in parts:
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
            for name, a in tensors.items():
                if ".lora_A" not in name:
                    continue
                path = name.removeprefix("base_model.model.").partition(".lora_A")[0]
                b = tensors[name.replace(".lora_A", ".lora_B")]
                root = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
                scale = (scales or {}).get(path, config["lora_alpha"] / root)
                modules[path].weight += weight * scale * (b.double() @ a.double())
    return model


class Driven:
    """A model under one mix, for `driving.run`: or under `mixes`, one for each sequence of a batch."""

    def __init__(self, model: Any, mix: Mix = (), mixes: tuple[Mix, ...] | None = None) -> None:
        self.spec, self.device, self._mix, self._mixes = model.spec, model.device, mix, mixes
        self._adapted = Adapted(model)

    def forward(self, batch: Any, kv: Any) -> torch.Tensor:
        plan = Plan.of(batch)
        mixes = self._mixes or (self._mix,) * len(plan.kv_lengths)
        return self._adapted.forward_plan(replace(plan, mixes=mixes), kv)


def shapes_of(model: Any, wanted: tuple[str, ...] = LINEARS) -> dict[str, tuple[int, int]]:
    """Module path -> (in, out) of a loaded Transformer's matrices."""
    shapes = {}
    for block in model.blocks:
        for part, linear in zip(LINEARS, block.linears, strict=False):
            if part in wanted:
                path = model.spec.names.linear(block.layer.index, part)[0].path
                shapes[path] = (linear.kernel.shape.in_features, linear.kernel.shape.out_features)
    return shapes


def check_rows_apart(model: Any, adapters: tuple[Any, Any], texts: tuple[list[int], list[int]], *, exact: bool) -> None:
    """Sequences of one pass with adapters of their own, one of them with none, against each alone, however it is cut.
    exact: to the bit."""
    (one, two), (first, second) = adapters, texts
    mixes = (mix_of([(one, 1.0)]), (), mix_of([(one, 0.5), (two, 1.0)]), mix_of([(one, 1.0)]))
    sequences = [(first, 0, [4]), (second, 0, [1]), (first, 0, [0]), (second, 0, [3])]
    together = Driven(model, mixes=mixes).forward(batch_of(sequences), new_cache(model))
    parts = together.split([len(ids) for ids, _, _ in sequences])
    for part, mix, (ids, _, _) in zip(parts, mixes, sequences, strict=True):
        for cuts in ([], [1, 20]):
            alone = run(Driven(model, mix), ids, cuts)
            assert (part - alone).abs().max() <= (0.0 if exact else 1e-4 * alone.abs().max().item())
    # The native pass of the model itself is untouched by all this.
    assert (run(model, second, []) - parts[1]).abs().max() <= (0.0 if exact else 1e-4)
