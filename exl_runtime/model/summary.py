"""`exl info`: what a model folder holds, read from headers alone. Loads no weights."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache.geometry import free_memory
from ..cache.types import CacheType
from ..checkpoint.reader import Checkpoint
from ..config.names import Source
from ..config.read import load_config
from ..config.resolve import resolve
from ..config.spec import MlpSpec, ModelSpec
from ..errors import OutOfMemory
from ..formats.detect import MARKERS
from .attending import attention_lines, pages_like
from .placement import auto_context, cache_bytes, cache_pages, geometry_of, plan, resolve_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class KindSummary:
    """All matrices of one kind (attention, mlp, ...): how many, how large, stored how."""

    kind: str
    matrices: int
    weights: int
    bits_per_weight: float
    formats: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """Sizes in bytes, lengths in tokens. `bits_per_weight` counts the decoder layers, as EXL2 names do.

    cache_bytes is the least for one sequence of `context` tokens. A load asked for that context (or for "auto", when
    none was named) would take a context of load_context now, and load_cache_bytes for it: room for batches and earlier
    prompts comes with it. Both are 0 when it would not fit.
    """

    name: str
    path: str
    architecture: str
    format: str
    parameters: int
    bits_per_weight: float
    file_bytes: int
    weight_bytes: int
    kinds: tuple[KindSummary, ...]
    context_length: int
    context: int
    cache_dtype: str  # type of keys and values: "fp16", "q8", "k6v4" ...
    cache_bytes: int
    working_bytes: int
    total_bytes: int
    free_bytes: int
    load_context: int = 0
    load_cache_bytes: int = 0
    attention: tuple[str, ...] = ()  # on the GPU that is here: who does it, and why
    layers: int = 0
    windows: tuple[tuple[int, int], ...] = ()  # layers, and the last tokens they see and keep of that context


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """All matrices of a model as they lie on disk, without biases and norms.

    format           its quantized format if it has one, else "dense"; "exl2+gptq" for a mixture
    bits_per_weight  of the decoder layers, as EXL2 names count
    """

    format: str
    bits_per_weight: float
    nbytes: int
    kinds: tuple[KindSummary, ...]


@dataclass(slots=True)
class _Tally:
    matrices: int = 0
    weights: int = 0
    bits: float = 0.0


def summarize(
    folder: Path | str, context: int | None = None, *, cache: str = "auto", device: str = "cpu"
) -> ModelSummary:
    """Describe the model in `folder`, and the memory a context of `context` tokens (default: the model's own) takes.

    Raises ConfigError, UnsupportedModel or CheckpointError like loading would.
    """
    folder = Path(folder)
    files = load_config(folder)
    spec = resolve(files.config, files.generation)
    where = torch.device(device)
    kind = resolve_cache(cache, where)
    with Checkpoint.open(folder) as checkpoint:
        stored = stored_weights(checkpoint, spec)
        file_bytes = checkpoint.total_bytes
    weight_bytes = stored.nbytes
    free = free_memory(where)
    needed = plan(spec, context=context or spec.context_length, weight_bytes=weight_bytes, cache=kind)
    return ModelSummary(
        name=folder.resolve().name,
        path=str(folder),
        architecture=spec.architecture,
        format=stored.format,
        parameters=sum(kind.weights for kind in stored.kinds),
        bits_per_weight=stored.bits_per_weight,
        file_bytes=file_bytes,
        weight_bytes=weight_bytes,
        kinds=stored.kinds,
        layers=len(spec.layers),
        context_length=spec.context_length,
        context=needed.context,
        cache_dtype=kind.name,
        cache_bytes=needed.cache_bytes,
        working_bytes=needed.working_bytes,
        total_bytes=needed.total_bytes,
        free_bytes=free,
        attention=_attention(spec, cache),
        windows=_windows(spec, kind, needed.context),
        **_load(spec, context, kind, where, free - weight_bytes),
    )


def _load(spec: ModelSpec, context: int | None, cache: CacheType, device: torch.device, free: int) -> dict[str, int]:
    """What opening the model would take for its cache, with `free` bytes beside the weights."""
    try:
        length = auto_context(spec, cache=cache, device=device, free=free) if context is None else context
    except OutOfMemory:
        return {}
    geometry = geometry_of(spec, cache, length)
    nbytes = cache_bytes(geometry, cache_pages(geometry, length, device=device, free=free))
    return {"load_context": length, "load_cache_bytes": nbytes} if nbytes <= free else {}


def _windows(spec: ModelSpec, cache: CacheType, context: int) -> tuple[tuple[int, int], ...]:
    groups = geometry_of(spec, cache, context).groups
    return tuple((len(group.layers), group.window) for group in groups if group.window is not None)


def _attention(spec: ModelSpec, cache: str) -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    card = torch.device("cuda")
    return attention_lines(spec, pages_like(spec, resolve_cache(cache, card)), card)


def stored_weights(checkpoint: Checkpoint, spec: ModelSpec) -> StoredWeights:
    """What the headers of an open checkpoint say about the matrices of `spec`."""
    tallies, formats = _tally(checkpoint, spec)
    inside = [tally for kind, tally in tallies.items() if kind not in ("embedding", "head")]
    quantized = sorted(set().union(*formats.values()) - {"dense"})
    return StoredWeights(
        format="+".join(quantized) or "dense",
        bits_per_weight=sum(tally.bits for tally in inside) / max(1, sum(tally.weights for tally in inside)),
        nbytes=int(sum(tally.bits for tally in tallies.values()) / 8),
        kinds=tuple(
            KindSummary(
                kind=kind,
                matrices=tally.matrices,
                weights=tally.weights,
                bits_per_weight=tally.bits / max(1, tally.weights),
                formats=tuple(sorted(formats[kind])),
            )
            for kind, tally in tallies.items()
        ),
    )


def _tally(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[dict[str, _Tally], dict[str, set[str]]]:
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    formats: dict[str, set[str]] = defaultdict(set)

    def count(kind: str, sources: tuple[Source, ...], weights: int) -> None:
        found = stored_bits(checkpoint, sources)
        if found is None:
            return
        bits, name = found
        tallies[kind].matrices += 1
        tallies[kind].weights += weights
        tallies[kind].bits += bits
        formats[kind].add(name)

    def paths(candidates: tuple[str, ...]) -> tuple[Source, ...]:
        return tuple(Source(path=path) for path in candidates)

    names, hidden = spec.names, spec.hidden_size
    if not any(checkpoint.has(f"{path}.weight") for path in names.embedding):
        checkpoint.info(f"{names.embedding[0]}.weight")  # raises, naming the nearest tensor there is
    count("embedding", paths(names.embedding), spec.vocab_size * hidden)
    for layer in spec.layers:
        i = layer.index
        for part, heads in (("q_proj", spec.heads), ("k_proj", spec.kv_heads), ("v_proj", spec.kv_heads)):
            count("attention", names.linear(i, part), hidden * heads * spec.head_dim)
        count("attention", names.linear(i, "o_proj"), hidden * spec.heads * spec.head_dim)
        inner = layer.mlp.intermediate_size
        if isinstance(layer.mlp, MlpSpec):
            for part in ("gate_proj", "up_proj", "down_proj"):
                count("mlp", names.linear(i, part), hidden * inner)
            continue
        count("router", names.router(i), hidden * layer.mlp.experts)
        for expert in range(layer.mlp.experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                count("experts", names.expert_linear(i, expert, part), hidden * inner)
    count("head", paths(names.head), spec.vocab_size * hidden)
    return dict(tallies), dict(formats)


def stored_bits(checkpoint: Checkpoint, sources: tuple[Source, ...]) -> tuple[float, str] | None:
    """(bits on disk without the bias, format name) of the first source that exists; a slice counts its share."""
    for source in sources:
        if source.expert is not None:
            if checkpoint.has(source.path):
                info = checkpoint.info(source.path)
                share = 1.0 if source.start is None else (source.stop - source.start) / source.total
                return info.nbytes * 8 / info.shape[0] * share, "dense"
            continue
        suffixes = checkpoint.suffixes(source.path)
        name = next((cls.name for marker, cls in MARKERS.items() if marker in suffixes), None)
        if name is None:
            continue
        infos = [checkpoint.info(f"{source.path}.{suffix}") for suffix in suffixes if suffix != "bias"]
        share = 1.0 if source.start is None else (source.stop - source.start) / source.total
        return sum(info.nbytes for info in infos) * 8 * share, name
    return None
