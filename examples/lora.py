"""LoRA adapters: loaded beside the model, chosen and mixed by request, several in one batch.

python examples/lora.py [MODEL_FOLDER ADAPTER_FOLDER]        without arguments: the demo, and an adapter made of chance
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import exl_runtime as exl


def make(folder: Path, model: Path) -> Path:
    """An adapter of random numbers for the value projections, in the files that peft writes."""
    config = json.loads((model / "config.json").read_text())
    width, rank, tensors = config["hidden_size"], 4, {}
    values = width // config["num_attention_heads"] * config["num_key_value_heads"]
    torch.manual_seed(1)
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_"
        tensors[f"{name}A.weight"] = torch.randn(rank, width) / width**0.5
        tensors[f"{name}B.weight"] = torch.randn(values, rank) / rank**0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


with exl.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as rt, tempfile.TemporaryDirectory() as place:
    path = sys.argv[2] if len(sys.argv) > 2 else make(Path(place) / "chance", Path(rt.info.path))
    name = rt.load_lora(path)
    greedy = exl.SamplingParams(temperature=0)
    for weight in (0, 0.3, 1):
        reply = rt.generate("Once upon a time", max_tokens=24, sampling=greedy, lora={name: weight})
        print(f"{name} with weight {weight}:", reply.text.strip())
    rt.set_lora({name: 0.3})  # for all requests that do not say
    print("by default:", rt.generate("Once upon a time", max_tokens=24, sampling=greedy).text.strip())
    rt.unload_lora(name)
    print("unloaded:", rt.generate("Once upon a time", max_tokens=24, sampling=greedy).text.strip())
