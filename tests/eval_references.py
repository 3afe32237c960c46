"""For tests of divergence: a tiny model and a variant of it, the options of a command, windows, and the oracle."""

import argparse
import shutil
from pathlib import Path

import eval_models
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from eval.protocol import Window

LENGTH = 40


def variant(source: Path, folder: Path, scale: float, seed: int = 7) -> Path:
    """A copy of `source` with noise on its matrices: `scale` of their own standard deviation."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = tensor + torch.randn(tensor.shape, generator=generator) * tensor.std() * scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def options(cache: Path | None = None, **more: object) -> argparse.Namespace:
    """What `add_loading` and `add_reference` leave; cache None: --no-reference-cache."""
    given = {"device": "cpu", "backend": "auto", "cache": "auto", "threads": 1}
    return argparse.Namespace(
        **{**given, "reference_cache": cache, "no_reference_cache": cache is None, **more},
    )


def some_windows(count: int = 4, first: int = 1, length: int = LENGTH) -> list[Window]:
    """Windows of characters without sense."""
    n = count * length
    ids = [(7 * i * i + 3 * i + i // 5) % len(eval_models.CHARACTERS) + eval_models.FIRST for i in range(n)]
    return [Window(tuple(ids[i : i + length]), first) for i in range(0, n, length)]


def log_probabilities(folder: Path, window: Window) -> np.ndarray:
    """float64 (scored, vocab), by transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([window.ids]), use_cache=False).logits[0].double()
    return torch.log_softmax(logits[window.first - 1 : -1], dim=-1).numpy()
