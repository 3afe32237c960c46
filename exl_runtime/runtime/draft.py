"""Opens the draft model: a smaller one, or the same with fewer bits, that knows the same tokens."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..cache.geometry import CacheGeometry
from ..cache.storage import KVStorage
from ..cache.types import FP16, FP32
from ..checkpoint.packed import NOT_KEPT, PackedCache
from ..checkpoint.reader import Checkpoint
from ..config.read import load_config
from ..config.resolve import resolve
from ..errors import UsageError
from ..model.loader import load_transformer
from ..model.placement import geometry_beside
from ..model.transformer import Transformer
from ..tokenizer.same import first_difference
from ..tokenizer.tokenizer import Tokenizer


def open_draft(
    folder: Path,
    *,
    tokenizer: Tokenizer,
    beside: KVStorage,
    device: torch.device,
    backend: str,
    dtype: torch.dtype | None,
    packed: PackedCache | None = None,
    progress: Callable[[int, int], None],
) -> tuple[Transformer, KVStorage]:
    """The model in `folder` and as many pages for it as there are `beside` it. Raises UsageError when it has other
    tokens, and what loading raises."""
    files = load_config(folder)
    spec = resolve(files.config, files.generation)
    require_same_tokens(tokenizer, Tokenizer.open(folder), folder)
    with Checkpoint.open(folder) as checkpoint:
        kept = NOT_KEPT if packed is None else packed.open(checkpoint, [files.config, files.quantization])
        model = load_transformer(
            checkpoint,
            spec,
            quantization=files.quantization,
            device=device,
            backend=backend,
            dtype=dtype,
            packed=kept,
            progress=progress,
        )
        kept.keep()
    geometry = draft_geometry(folder, beside.geometry, device)
    assert geometry is not None, "pages that the draft model cannot share"
    return model, KVStorage(geometry, beside.counts, device)


def draft_geometry(folder: Path, geometry: CacheGeometry, device: torch.device) -> CacheGeometry | None:
    """The shape of the draft model's keys and values; None where it cannot share pages of that `geometry`."""
    files = load_config(folder)
    cache = FP32 if device.type == "cpu" else FP16
    return geometry_beside(geometry, resolve(files.config, files.generation), cache)


def require_same_tokens(tokenizer: Tokenizer, other: Tokenizer, folder: Path) -> None:
    """Raise UsageError unless every id means the same token to both."""
    if (found := first_difference(tokenizer, other)) is not None:
        token, ours, theirs = found
        raise UsageError(
            f"the draft model {folder.name} has other tokens: id {token} is {theirs!r}, the model's is {ours!r}",
            hint="take a smaller model of the same family, or the same model with fewer bits per weight",
        )
