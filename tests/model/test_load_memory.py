"""What a load takes: the weights once, and one matrix being packed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import unavailable
from safetensors.torch import save_file

MB = 1 << 20
# In a process of its own: the high-water mark of this one has the tests before it in it.
SCRIPT = """
import json, sys
from pathlib import Path
from driving import open_model

def marks():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("Vm"))
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}

open_model(Path(sys.argv[1]), "cpu")  # code, torch's own memory; all of it is given back
before = marks()["VmRSS"]
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark begins anew
model = open_model(Path(sys.argv[1]), "cpu")
print(json.dumps({"before": before, "peak": marks()["VmHWM"], "weights": model.nbytes}))
"""


HIDDEN, INNER, LAYERS, HEADS, KEYS, VOCAB = 1024, 2816, 6, 16, 4, 8000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def exl2(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    """Any bits are a valid matrix of 4-bit codes."""
    groups = inputs // 128
    return {
        "q_weight": torch.randint(-(1 << 31), (1 << 31) - 1, (inputs // 8, outputs), dtype=torch.int32),
        "q_scale": torch.randint(0, 1 << 31, (groups, outputs // 8), dtype=torch.int32),
        "q_scale_max": torch.full((groups,), 0.01).half(),
        "q_groups": torch.tensor([[4, 16 * group] for group in range(groups)]).flatten().to(torch.int16),
        "q_invperm": torch.randperm(inputs).to(torch.int32),
    }


def bf16(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(outputs, inputs, dtype=torch.bfloat16)}


def write(folder: Path, matrix: Callable[[int, int], dict[str, torch.Tensor]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    sizes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    sizes |= {f"self_attn.{part}_proj": (HIDDEN, HIDDEN * KEYS // HEADS) for part in "kv"}
    sizes |= {f"mlp.{part}_proj": (HIDDEN, INNER) for part in ("gate", "up")} | {"mlp.down_proj": (INNER, HIDDEN)}
    tensors = {"model.embed_tokens.weight": torch.ones(VOCAB, HIDDEN).half(), "model.norm.weight": torch.ones(HIDDEN)}
    matrices = {"lm_head": (HIDDEN, VOCAB)}
    for layer in range(LAYERS):
        matrices |= {f"model.layers.{layer}.{name}": size for name, size in sizes.items()}
        for norm in ("input", "post_attention"):
            tensors[f"model.layers.{layer}.{norm}_layernorm.weight"] = torch.ones(HIDDEN)
    for name, size in matrices.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in matrix(*size).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("matrix", [exl2, bf16])
def test_the_peak_is_the_weights_and_little_more(
    matrix: Callable[[int, int], dict[str, torch.Tensor]], tmp_path: Path, repo: Path
) -> None:
    if why := unavailable("cpu"):
        pytest.skip(why)
    folder = write(tmp_path / "m", matrix)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=repo / "tests",
        env={**os.environ, "PYTHONPATH": f"{repo}:{repo / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Beyond the weights: the codes of a matrix, 4 MiB of the head; ends of huge pages; small tensors.
    assert found["peak"] - found["before"] < found["weights"] + 10 * MB, found
    assert found["peak"] - found["before"] > 0.9 * found["weights"] - 4 * MB, found
