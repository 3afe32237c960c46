"""A model with cache and attention on the CUDA kernels, its matrices on the CPU: the seams fit, the logits stay."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import unavailable
from driving import batch_of, new_cache, open_model

from exl_runtime.cache.types import cache_type
from exl_runtime.model import loader
from exl_runtime.model.transformer import Transformer
from exl_runtime.ops import kv_cuda
from exl_runtime.ops.attention import cuda
from exl_runtime.ops.table import opset

IDS = [(7 * i * i + 3) % 500 for i in range(60)]


def logits(model: Transformer, cuts: list[int], cache: str) -> torch.Tensor:
    kv = new_cache(model, type=cache_type(cache))
    parts, past = [], 0
    for end in [*cuts, len(IDS)]:
        parts.append(model.forward(batch_of([(IDS[past:end], past, [2])]), kv))
        past = end
    return torch.cat(parts)


@pytest.mark.parametrize(("cache", "bound"), [("fp16", 2.0**-8), ("q8", 2.0**-6)])
def test_the_logits_are_those_of_the_cpu(
    emulated, demo: Path, monkeypatch: pytest.MonkeyPatch, cache: str, bound: float
) -> None:
    """Halves round each layer to 2^-11; a code of eight bits that falls the other way moves a key by 2^-7."""
    if why := unavailable("cpu"):
        pytest.skip(why)
    expected = logits(open_model(demo, "cpu"), [], cache)
    ops = replace(opset("cpu"), rope=kv_cuda.rope, append_kv=kv_cuda.append_kv, paged_attention=cuda.paged_attention)
    monkeypatch.setattr(loader, "opset", lambda backend: ops)
    model = open_model(demo, "cpu")
    for cuts in ([], [40, 56, 57, 58, 59]):
        error = (logits(model, cuts, cache) - expected).abs().max() / expected.abs().max()
        assert error <= bound, f"cut at {cuts}: {error:.3g} of the largest logit"
