"""Whole trained models: quantized weights stay close to the half-precision originals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from exl_runtime.formats import FormatHints, LinearShape, dequantize, load_linear


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors


def modules(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, suffix = name.rpartition(".")
        grouped.setdefault(path, {})[suffix] = tensor
    return grouped


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.mark.parametrize(
    ("name", "floor"),
    [("ember-6m-exl2", 0.985), ("ember-6m-gptq-4bit-g128", 0.985), ("ember-6m-gptq-3bit-g64", 0.93)],
)
def test_quantized_models_resemble_their_original(name: str, floor: float, shared: Path) -> None:
    folder = shared / "models" / name
    original = read(shared / "models" / "ember-6m")
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    hints = FormatHints.from_json(declared)
    found = 0
    for path, tensors in modules(read(folder)).items():
        if not {"q_weight", "qweight"} & tensors.keys():
            continue
        want = original[f"{path}.weight"].float().t()
        matrix = load_linear(tensors, LinearShape(*want.shape), where=f"{path} in {name}", hints=hints)
        assert correlation(matrix.dequantize(), want) > floor, path
        found += 1
    assert found >= 42


def test_the_demo_agrees_with_the_bundled_original(demo: Path, ember: Path) -> None:
    original, quantized = read(ember), modules(read(demo))
    for path in ("model.layers.0.mlp.down_proj", "model.layers.5.self_attn.q_proj", "lm_head"):
        assert correlation(dequantize(quantized[path]), original[f"{path}.weight"].float().t()) > 0.985
