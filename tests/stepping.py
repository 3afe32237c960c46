"""Drives a model natively and operator by operator, through the same passes."""

from dataclasses import replace

import pytest
import torch
from driving import batch_of
from torch import Tensor

from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP32, CacheType
from exl_runtime.model.batch import ForwardBatch
from exl_runtime.model.placement import geometry_of
from exl_runtime.model.transformer import Transformer

IDS = [(7 * i * i + 3 * i + 11) % 128 + 3 for i in range(300)]


def passes(model: Transformer, type: CacheType, context: int | None = None) -> list[tuple[Tensor, ...]]:
    """Logits and cache after each of a few passes: a prompt of several pages, then single tokens, guesses and prompts
    of several sequences in one ragged batch, one of them without new tokens. context: see `geometry_of`."""
    kv = KVStorage(geometry_of(model.spec, type, context), 6, model.device)
    rope = model.spec.rope_length(300)
    batches = [
        batch_of([(IDS[:270], 0, [3, 1])], rope_length=rope, all_logits=False),
        batch_of([(IDS[270:271], 270, [3, 1])], rope_length=rope),
        batch_of([(IDS[271:276], 271, [3, 1]), (IDS[:1], 0, [5]), (IDS[40:59], 0, [4])], rope_length=rope),
        batch_of([(IDS[276:277], 276, [3, 1]), (IDS[1:2], 1, [5]), (IDS[59:60], 19, [4])], rope_length=rope),
        some_rows(batch_of([(IDS[277:290], 277, [3, 1]), ([], 2, [5])], rope_length=rope), [0, 7, 12]),
    ]
    return [(model.forward(in_groups(batch, kv), kv), *written(kv)) for batch in batches]


def written(kv: KVStorage) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for part in kv.parts for tensor in part)


def in_groups(batch: ForwardBatch, kv: KVStorage) -> ForwardBatch:
    """The batch with pages for every group: in every second one they are counted from the other end. Those that no
    query's window reaches have left."""
    size, slots, tables = kv.page_size, [], []
    for number, group in enumerate(kv.geometry.groups):
        table = batch.pages.clone()
        last, page = kv.counts[number] - 1, batch.slots // size
        if number % 2:
            table, page = last - table, last - page
        new = (batch.q_starts[1:] - batch.q_starts[:-1]).tolist()
        for row, (length, count) in enumerate(zip(batch.kv_lengths.tolist(), new, strict=True)):
            oldest = 0 if group.window is None else max(0, length - count - group.window + 1)
            table[row, : oldest // size] = 0
        slots.append(page * size + batch.slots % size)
        tables.append(table)
    return replace(batch, slots=torch.cat(slots), pages=torch.cat(tables))


def some_rows(batch: ForwardBatch, rows: list[int]) -> ForwardBatch:
    return replace(batch, logit_rows=torch.tensor(rows))


def by_operators(model: Transformer, monkeypatch: pytest.MonkeyPatch, type: CacheType, context: int | None = None):
    """The same without the native pass."""
    with monkeypatch.context() as patch:
        patch.setattr("exl_runtime.model.transformer.native_step", lambda *parts, **options: None)
        model.forget_step()
        assert model.step is None
        found = passes(model, type, context)
    model.forget_step()
    return found


def assert_same(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, type: CacheType = FP32, context: int | None = None
) -> None:
    assert model.step is not None
    pairs = zip(passes(model, type, context), by_operators(model, monkeypatch, type, context), strict=True)
    for number, (ours, wanted) in enumerate(pairs):
        for part, (one, other) in enumerate(zip(ours, wanted, strict=True)):
            what = "logits" if part == 0 else ("values", "keys")[part % 2]
            assert torch.equal(one, other), f"{what} of pass {number}"
