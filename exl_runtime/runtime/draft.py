"""Opens the draft model: a smaller one, or the same with fewer bits, that knows the same tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import Self

from ..cache.geometry import CacheGeometry, free_memory
from ..cache.storage import KVStorage
from ..cache.types import FP16, FP32, CacheType
from ..checkpoint.packed import NOT_KEPT, PackedCache
from ..checkpoint.reader import Checkpoint
from ..config.read import load_config
from ..config.resolve import resolve
from ..config.spec import ModelSpec
from ..errors import UsageError
from ..model.loader import load_transformer
from ..model.placement import geometry_beside, geometry_of, plan, working_bytes
from ..model.summary import stored_weights
from ..model.transformer import Transformer
from ..tokenizer.same import first_difference
from ..tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class DraftNeeds:
    """What the draft model in `folder` takes of a device, from headers alone."""

    folder: Path
    spec: ModelSpec
    weight_bytes: int

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Raises ConfigError, UnsupportedModel or CheckpointError as loading would."""
        files = load_config(folder)
        spec = resolve(files.config, files.generation)
        with Checkpoint.open(folder) as checkpoint:
            return cls(folder, spec, stored_weights(checkpoint, spec).nbytes)

    def total_bytes(self, context: int, device: torch.device) -> int:
        """Weights, a cache for one context, and what it computes with."""
        return plan(self.spec, context=context, weight_bytes=self.weight_bytes, cache=_cache_on(device)).total_bytes

    def left(self, other: ModelSpec, page_bytes: int, device: torch.device) -> int:
        """Bytes for the other model's cache on the device where this one will be: there its pages take `page_bytes`
        each, and with every page comes one of this model's."""
        rest = free_memory(device) - self.weight_bytes - working_bytes(self.spec) - working_bytes(other)
        own = geometry_of(self.spec, _cache_on(device)).bytes_per_page
        return max(0, rest) * page_bytes // (page_bytes + own)


def _cache_on(device: torch.device) -> CacheType:
    return FP32 if device.type == "cpu" else FP16


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
    return geometry_beside(geometry, resolve(files.config, files.generation), _cache_on(device))


def require_same_tokens(tokenizer: Tokenizer, other: Tokenizer, folder: Path) -> None:
    """Raise UsageError unless every id means the same token to both."""
    if (found := first_difference(tokenizer, other)) is not None:
        token, ours, theirs = found
        raise UsageError(
            f"the draft model {folder.name} has other tokens: id {token} is {theirs!r}, the model's is {ours!r}",
            hint="take a smaller model of the same family, or the same model with fewer bits per weight",
        )
