"""Drives a model natively and operator by operator, through the same passes."""

from dataclasses import replace

import pytest
import torch
from driving import batch_of, new_cache
from torch import Tensor

from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP32, CacheType
from exl_runtime.model.batch import ForwardBatch
from exl_runtime.model.transformer import Transformer

IDS = [(7 * i * i + 3 * i + 11) % 128 + 3 for i in range(300)]


def passes(model: Transformer, type: CacheType) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits and cache after each of a few passes: a prompt of several pages, then single tokens, guesses and prompts
    of several sequences in one ragged batch, one of them without new tokens."""
    kv = new_cache(model, type=type)
    rope = model.spec.rope_length(300)
    batches = [
        batch_of([(IDS[:270], 0, [3, 1])], rope_length=rope, all_logits=False),
        batch_of([(IDS[270:271], 270, [3, 1])], rope_length=rope),
        batch_of([(IDS[271:276], 271, [3, 1]), (IDS[:1], 0, [5]), (IDS[40:59], 0, [4])], rope_length=rope),
        batch_of([(IDS[276:277], 276, [3, 1]), (IDS[1:2], 1, [5]), (IDS[59:60], 19, [4])], rope_length=rope),
        some_rows(batch_of([(IDS[277:290], 277, [3, 1]), ([], 2, [5])], rope_length=rope), [0, 7, 12]),
    ]
    return [(model.forward(batch, kv), *written(kv)) for batch in batches]


def written(kv: KVStorage) -> tuple[Tensor, Tensor]:
    return kv.keys.clone(), kv.values.clone()


def some_rows(batch: ForwardBatch, rows: list[int]) -> ForwardBatch:
    return replace(batch, logit_rows=torch.tensor(rows))


def by_operators(model: Transformer, monkeypatch: pytest.MonkeyPatch, type: CacheType):
    """The same without the native pass."""
    with monkeypatch.context() as patch:
        patch.setattr("exl_runtime.model.transformer.native_step", lambda *parts, **options: None)
        model.forget_step()
        assert model.step is None
        found = passes(model, type)
    model.forget_step()
    return found


def assert_same(model: Transformer, monkeypatch: pytest.MonkeyPatch, type: CacheType = FP32) -> None:
    assert model.step is not None
    pairs = zip(passes(model, type), by_operators(model, monkeypatch, type), strict=True)
    for number, (ours, wanted) in enumerate(pairs):
        for what, one, other in zip(("logits", "keys", "values"), ours, wanted, strict=True):
            assert torch.equal(one, other), f"{what} of pass {number}"
