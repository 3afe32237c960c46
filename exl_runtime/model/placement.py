"""Where a model runs and how long a context fits beside it: the memory model behind `exl info` and `context="auto"`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..cache.geometry import PAGE_SIZE, CacheGeometry, free_memory, useful_window
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


def geometry_of(spec: ModelSpec, cache: CacheType, context: int | None = None) -> CacheGeometry:
    """The shape of the keys and values of this model. Layers with a window keep what they see of a context of `context`
    tokens; without one they keep all."""
    windows = tuple(
        None if context is None else useful_window(layer.window, context, PAGE_SIZE) for layer in spec.layers
    )
    return CacheGeometry(
        layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        type=cache,
        windows=() if set(windows) == {None} else windows,
    )


def geometry_beside(geometry: CacheGeometry, spec: ModelSpec, cache: CacheType) -> CacheGeometry | None:
    """The shape of the keys and values of a second model that shares the page numbers of `geometry`: each of its layers
    in the group that keeps just enough for it. None where one keeps too little, or a group would have no layer."""
    kept = [group.window for group in geometry.groups]
    windows = []
    for layer in spec.layers:
        enough = [one for one in kept if one is None or (layer.window is not None and layer.window <= one)]
        if not enough:
            return None
        windows.append(enough[-1])
    plain = geometry_of(spec, cache)
    return replace(plain, windows=() if kept == [None] else tuple(windows)) if set(windows) == set(kept) else None


def held_bytes(geometry: CacheGeometry, context: int) -> int:
    """The least cache for one sequence of `context` tokens: in every group what it holds at a time, and one page more,
    as a shared page is copied before a second sequence writes to it."""
    return sum(
        geometry.bytes_of(group) * count
        for group, count in zip(geometry.groups, _least(geometry, context), strict=True)
    )


def _least(geometry: CacheGeometry, context: int) -> list[int]:
    return [geometry.pages_held(group, context, PREFILL_TOKENS) + 1 for group in geometry.groups]


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
    return MemoryPlan(
        context=context,
        weight_bytes=weight_bytes,
        cache_bytes=held_bytes(geometry_of(spec, cache, context), context),
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
    geometry: CacheGeometry, context: int, *, device: torch.device, free: int | None = None
) -> tuple[int, ...]:
    """Pages, in every group of layers, for one full context and a copied page, and as many more as memory allows, up to
    SPARE contexts.

    The spare ones serve batches and remember earlier prompts. On the CPU they cost nothing until they are used.
    free: bytes beside the weights; None: what is free now.
    """
    free = free_memory(device) if free is None else free
    least = _least(geometry, context)
    spare = [min(SPARE * (count - 1), SPARE_TOKENS // PAGE_SIZE) for count in least]
    sizes = [geometry.bytes_of(group) for group in geometry.groups]
    room = max(0, int(free * SHARE * SHARE) - held_bytes(geometry, context))
    wanted = sum(size * count for size, count in zip(sizes, spare, strict=True))
    share = min(room, wanted)
    return tuple(count + more * share // wanted for count, more in zip(least, spare, strict=True))


def cache_bytes(geometry: CacheGeometry, pages: Sequence[int]) -> int:
    """Bytes of so many pages of every group."""
    return sum(geometry.bytes_of(group) * count for group, count in zip(geometry.groups, pages, strict=True))


def auto_context(spec: ModelSpec, *, cache: CacheType, device: torch.device, free: int | None = None) -> int:
    """The longest context, up to the model's own, whose cache fits into the memory that is free now.

    free: bytes beside the weights; None: what is free now, after loading them. Raises OutOfMemory when not even one
    page fits.
    """
    total = free_memory(device) if free is None else max(0, free)
    room = int((total - working_bytes(spec) - min(RESERVE, total // 4)) * SHARE)
    context = longest_context(
        spec.context_length, lambda tokens: held_bytes(geometry_of(spec, cache, tokens), tokens) <= room
    )
    if context is None:
        geometry = geometry_of(spec, cache)
        raise OutOfMemory(
            f"{total / 2**30:.1f} GiB are free on {device}: too little for a cache page of "
            f"{geometry.bytes_per_page / 2**20:.0f} MiB",
            hint="close other programs, or choose a smaller cache type (--cache q8)",
        )
    return context


def longest_context(most: int, fits: Callable[[int], bool]) -> int | None:
    """The longest context in whole pages, or `most`, that fits; None: not even one page does.

    From the top: a longer context may take less, where it makes a window worth having.
    """
    whole = range(most // PAGE_SIZE * PAGE_SIZE, 0, -PAGE_SIZE)
    return next((tokens for tokens in (most, *whole) if fits(tokens)), None)
