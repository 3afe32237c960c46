"""Drives a Transformer by hand: one sequence, pages in a scrambled order, any cut into chunks."""

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from exl_runtime.cache.geometry import PAGE_SIZE
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP32, CacheType
from exl_runtime.checkpoint.reader import Checkpoint
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.model.batch import ForwardBatch
from exl_runtime.model.loader import load_transformer
from exl_runtime.model.placement import geometry_of
from exl_runtime.model.transformer import Transformer


def open_model(
    folder: Path, backend: str, dtype: torch.dtype | None = None, *, device: torch.device | str = "cpu"
) -> Transformer:
    files = load_config(folder)
    spec = resolve(files.config, files.generation)
    with Checkpoint.open(folder) as checkpoint:
        return load_transformer(
            checkpoint,
            spec,
            quantization=files.quantization,
            device=torch.device(device),
            backend=backend,
            dtype=dtype,
        )


def new_cache(model: Transformer, pages: int = 6, type: CacheType = FP32) -> KVStorage:
    return KVStorage(geometry_of(model.spec, type), pages, model.device)


def batch_of(
    sequences: list[tuple[list[int], int, list[int]]], *, rope_length: int = 0, all_logits: bool = True
) -> ForwardBatch:
    """sequences: (new tokens, tokens already in the cache, page numbers) of each."""
    tokens, positions, slots, starts, lengths, rows = [], [], [], [0], [], []
    for new, past, pages in sequences:
        where = range(past, past + len(new))
        tokens += new
        positions += where
        slots += [pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in where]
        starts.append(len(tokens))
        lengths.append(past + len(new))
        rows += range(starts[-2], starts[-1]) if all_logits else [starts[-1] - 1]
    width = max(len(pages) for _, _, pages in sequences)
    return ForwardBatch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        q_starts=torch.tensor(starts, dtype=torch.int32),
        kv_lengths=torch.tensor(lengths, dtype=torch.int32),
        pages=torch.tensor([[*pages, *[0] * (width - len(pages))] for _, _, pages in sequences], dtype=torch.int32),
        rope_lengths=(rope_length,) * len(sequences),
        logit_rows=torch.tensor(rows),
    )


def moved(batch: ForwardBatch, device: torch.device) -> ForwardBatch:
    """The batch, on another device."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})


def run(model: Transformer, ids: list[int], cuts: list[int], *, pages: list[int] | None = None) -> Tensor:
    """float32 (tokens, vocab): `ids` fed in chunks that end at `cuts`, into a fresh cache."""
    kv = new_cache(model)
    pages = pages or [4, 1, 3, 0, 2]
    rope_length = model.spec.rope_length(len(ids))
    parts, past = [], 0
    for end in [*cuts, len(ids)]:
        batch = batch_of([(ids[past:end], past, pages)], rope_length=rope_length)
        parts.append(model.forward(moved(batch, model.device), kv))
        past = end
    return torch.cat(parts)
