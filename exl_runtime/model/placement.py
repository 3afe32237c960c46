"""Where a model runs and how long a context fits beside it: the memory model behind `exl info` and `context="auto"`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..cache.geometry import PAGE_SIZE, CacheGeometry, free_memory
from ..cache.types import FP16, FP32, CacheType, cache_type
from ..config.spec import ModelSpec, MoeSpec
from ..errors import BackendUnavailable, OutOfMemory, UsageError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PREFILL_TOKENS = 512  # tokens of one forward pass at the most; sizes the working memory
RESERVE = 512 << 20  # left to the system and to the Python process
SPARE = 15  # contexts, and
SPARE_TOKENS = 16384  # tokens, whichever is less: room for batches and for prompts seen before
SHARE = 0.8  # of what is free after the weights, for the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes a loaded model takes, by purpose, for `context` tokens of cache."""

    context: int
    weight_bytes: int
    cache_bytes: int
    working_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.working_bytes


def resolve_device(requested: str) -> torch.device:
    """ "auto" | "cpu" | "cuda" | "cuda:1" -> a device that exists. Raises UsageError / BackendUnavailable."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as err:
        raise UsageError(f"unknown device {requested!r}", hint="use auto, cpu, cuda or cuda:N") from err
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {requested!r} is not supported", hint="use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendUnavailable("no CUDA device is usable here", hint="`exl doctor` says why; --device cpu works")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise BackendUnavailable(f"{requested}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_cache(requested: str, device: torch.device) -> CacheType:
    """ "auto", or a name of `cache.names`. auto is exact on the CPU (fp32) and half precision on a GPU."""
    if requested == "auto":
        return FP32 if device.type == "cpu" else FP16
    return cache_type(requested)


def resolve_dtype(requested: str) -> torch.dtype | None:
    """Element type of activations: "fp32" | "fp16" | "bf16"; None for "auto". Raises UsageError."""
    if requested == "auto":
        return None
    if requested not in DTYPES:
        raise UsageError(f"unknown element type {requested!r}", hint="use auto, fp32, fp16 or bf16")
    return DTYPES[requested]


@contextmanager
def memory_of(device: torch.device, what: str) -> Iterator[None]:
    """Where a GPU has no room left inside, raise OutOfMemory; everything that was there before stays usable."""
    try:
        yield
    except torch.OutOfMemoryError as err:
        total = f"{free_memory(device) / 2**30:.1f} GiB are free" if device.type == "cuda" else "it is full"
        raise OutOfMemory(
            f"no memory on {device} for {what}: {total}",
            hint="lower --context, choose a smaller cache type (--cache q8), or spread the model: --gpu-split auto",
        ) from err


def geometry_of(spec: ModelSpec, cache: CacheType) -> CacheGeometry:
    """The shape of one page of keys and values of this model."""
    return CacheGeometry(layers=len(spec.layers), kv_heads=spec.kv_heads, head_dim=spec.head_dim, type=cache)


def working_bytes(spec: ModelSpec, tokens: int = PREFILL_TOKENS) -> int:
    """Upper estimate of the activations of one forward pass over `tokens` tokens, float32."""
    inner = max(
        layer.mlp.intermediate_size * (layer.mlp.experts_per_token if isinstance(layer.mlp, MoeSpec) else 1)
        for layer in spec.layers
    )
    per_token = 4 * spec.hidden_size + 3 * inner + 2 * (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    return 4 * (tokens * per_token + 16 * spec.vocab_size)


def plan(spec: ModelSpec, *, context: int, weight_bytes: int, cache: CacheType) -> MemoryPlan:
    """What a context of `context` tokens costs beside `weight_bytes` of weights."""
    geometry = geometry_of(spec, cache)
    # One page more than the context: a shared page is copied before a second sequence writes to it.
    pages = geometry.pages_for(context) + 1
    return MemoryPlan(
        context=context,
        weight_bytes=weight_bytes,
        cache_bytes=pages * geometry.bytes_per_page,
        working_bytes=working_bytes(spec),
    )


def require_room(
    spec: ModelSpec, *, context: int | None, weight_bytes: int, cache: CacheType, device: torch.device
) -> None:
    """Raise OutOfMemory where the weights and the least cache cannot fit: known from headers, before anything is read.

    context: tokens; None: as many as fit, one page at the least.
    """
    least = plan(spec, context=context or PAGE_SIZE, weight_bytes=weight_bytes, cache=cache)
    free, needed = free_memory(device), least.weight_bytes + least.cache_bytes
    if needed > free:
        raise OutOfMemory(
            f"{free / 2**30:.2f} GiB are free on {device}, too little for weights of {weight_bytes / 2**30:.2f} GiB "
            f"and {least.cache_bytes / 2**30:.2f} GiB of cache for {least.context} tokens",
            hint="close other programs, or take a model of fewer bits, a shorter --context or a smaller --cache",
        )


def cache_pages(
    spec: ModelSpec, context: int, *, cache: CacheType, device: torch.device, free: int | None = None
) -> int:
    """Pages for one full context and a copied page, and as many more as memory allows, up to SPARE contexts.

    The spare ones serve batches and remember earlier prompts. On the CPU they cost nothing until they are used.
    free: bytes beside the weights; None: what is free now.
    """
    free = free_memory(device) if free is None else free
    geometry = geometry_of(spec, cache)
    least = geometry.pages_for(context) + 1
    fitting = int(free * SHARE * SHARE) // geometry.bytes_per_page
    spare = min(SPARE * geometry.pages_for(context), SPARE_TOKENS // PAGE_SIZE)
    return max(least, min(least + spare, fitting))


def auto_context(spec: ModelSpec, *, cache: CacheType, device: torch.device, free: int | None = None) -> int:
    """The longest context, up to the model's own, whose cache fits into the memory that is free now.

    free: bytes beside the weights; None: what is free now, after loading them. Raises OutOfMemory when not even one
    page fits.
    """
    total = free_memory(device) if free is None else max(0, free)
    geometry = geometry_of(spec, cache)
    room = total - working_bytes(spec) - min(RESERVE, total // 4)
    pages = int(room * SHARE) // geometry.bytes_per_page - 1
    if pages < 1:
        raise OutOfMemory(
            f"{total / 2**30:.1f} GiB are free on {device}: too little for a cache page of "
            f"{geometry.bytes_per_page / 2**20:.0f} MiB",
            hint="close other programs, or choose a smaller cache type (--cache q8)",
        )
    return min(spec.context_length, pages * PAGE_SIZE)
