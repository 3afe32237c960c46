"""`load(gpu_split=...)`: one model over several GPUs, and over the CPU where they are full."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..cache.types import CacheType
from ..checkpoint.reader import Checkpoint
from ..config.read import ConfigFiles
from ..config.spec import ModelSpec
from ..errors import UsageError
from ..model.placement import cache_pages, geometry_of
from ..model.split import Room, Stage, context_for, measure, plan_stages, rooms
from ..model.split_model import SplitCache, SplitTransformer, load_split


@dataclass(frozen=True, slots=True)
class Spread:
    """A model in stages, its cache, and the tokens of context that fit."""

    model: SplitTransformer
    kv: SplitCache
    context: int
    stages: tuple[Stage, ...]

    @property
    def devices(self) -> str:
        """ "cuda:0+cuda:1+cpu"."""
        return "+".join(str(stage.device) for stage in self.stages)


def available_rooms(split: str) -> list[Room]:
    """The devices of this machine, for `plan_stages`."""
    return rooms(split, [torch.device("cuda", i) for i in range(torch.cuda.device_count())])


def open_spread(
    checkpoint: Checkpoint,
    files: ConfigFiles,
    spec: ModelSpec,
    *,
    split: str,
    cache: CacheType,
    context: int | None,
    dtype: torch.dtype | None,
    hurry: bool,
    report: Callable[[str], None],
) -> Spread:
    """Plan, tell the plan, load, and make room for keys and values.

    split    "auto", or GiB for each GPU in order: "20,24"
    context  tokens; None: the model's own, or what fits the tightest device after loading
    Raises UsageError, OutOfMemory (before anything is loaded, where that can be known), and what loading raises.
    """
    stages = plan_stages(measure(checkpoint, spec, cache=cache, context=context), available_rooms(split))
    for stage in stages:
        report(str(stage))
    model = load_split(
        checkpoint,
        spec,
        stages,
        quantization=files.quantization,
        dtype=dtype,
        hurry=hurry,
        progress=lambda done, total: report(f"loading layer {done} of {total}"),
    )
    length = context_for(spec, stages, cache=cache) if context is None else context
    # Spare pages would have to fit everywhere: what the tightest device has room for.
    geometry = geometry_of(spec, cache, length)
    each = (cache_pages(geometry, length, device=stage.device) for stage in stages)
    pages = tuple(min(counts) for counts in zip(*each, strict=True))
    return Spread(model, SplitCache(geometry, pages, stages), length, stages)


def check_split(split: str | None, device: str, backend: str) -> None:
    """Raise UsageError where gpu_split meets settings that say otherwise."""
    if split is None:
        return
    if device not in ("auto", "cuda"):
        raise UsageError(f"gpu_split chooses the devices, device is {device!r}", hint="leave one of them out")
    if backend not in ("auto", "cuda"):
        raise UsageError(f"gpu_split needs the backend cuda, not {backend!r}", hint="leave one of them out")
