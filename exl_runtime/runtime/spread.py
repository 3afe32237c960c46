"""`load(gpu_split=...)`: one model over several GPUs, and over the CPU where they are full."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..cache.geometry import free_memory
from ..cache.types import CacheType
from ..checkpoint.reader import Checkpoint
from ..config.read import ConfigFiles
from ..config.spec import ModelSpec
from ..errors import OutOfMemory, UsageError
from ..model.placement import cache_pages, geometry_of
from ..model.split import GIB, LEAST_CONTEXT, Room, Stage, context_for, measure, plan_stages, rooms
from ..model.split_model import SplitCache, SplitTransformer, load_split
from .draft import DraftNeeds, draft_geometry

SHARE = 0.2  # of what is left on the draft model's device, for pages of it beyond one context


@dataclass(frozen=True, slots=True)
class Spread:
    """A model in stages, its cache, the tokens of context that fit, and where there is room for its draft model."""

    model: SplitTransformer
    kv: SplitCache
    context: int
    stages: tuple[Stage, ...]
    beside: Room | None

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
    draft: DraftNeeds | None,
    report: Callable[[str], None],
) -> Spread:
    """Plan, tell the plan, load, and make room for keys and values.

    split    "auto", or GiB for each GPU in order: "20,24"
    context  tokens; None: the model's own, or what fits the tightest device after loading
    draft    room is left for it on one device, the first that has it
    Raises UsageError, OutOfMemory (before anything is loaded, where that can be known), and what loading raises.
    """
    available, beside = available_rooms(split), None
    if draft is not None:
        available, beside = _set_aside(available, draft, context or min(spec.context_length, LEAST_CONTEXT))
    stages = plan_stages(measure(checkpoint, spec, cache=cache, context=context), available)
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
    length = context
    if length is None:
        # A longer context takes more of the draft model's device, too: what is left after the least, then after that.
        length = context_for(spec, stages, cache=cache, free=_free(draft, beside, LEAST_CONTEXT))
        if draft is not None:
            length = context_for(spec, stages, cache=cache, free=_free(draft, beside, length))
    geometry = geometry_of(spec, cache, length)
    if draft is not None and beside is not None and draft_geometry(draft.folder, geometry, beside.device) is None:
        geometry = geometry_of(spec, cache)  # what one of the models still sees has to stay for both
    # Spare pages would have to fit everywhere: what the tightest device has room for.
    free = _free(draft, beside, length)
    each = (cache_pages(geometry, length, device=stage.device, free=free(stage.device)) for stage in stages)
    pages = tuple(min(counts) for counts in zip(*each, strict=True))
    if draft is not None and beside is not None:  # which holds as many pages of its own
        least = geometry.pages_for(length) + 1
        spare = int(free(beside.device) * SHARE) // draft.page_bytes(beside.device)
        pages = tuple(min(count, least + spare) for count in pages)
    return Spread(model, SplitCache(geometry, pages, stages), length, stages, beside)


def _free(draft: DraftNeeds | None, beside: Room | None, context: int) -> Callable[[torch.device], int]:
    """Bytes free on a device, without what the draft model will take for a context of so many tokens."""

    def free(device: torch.device) -> int:
        room = free_memory(device)
        if draft is None or beside is None or device != beside.device:
            return room
        return max(0, room - draft.total_bytes(context, device))

    return free


def _set_aside(available: Sequence[Room], draft: DraftNeeds, context: int) -> tuple[list[Room], Room]:
    """The rooms with less in the first that holds the draft model, and that one."""
    found = list(available)
    for place, room in enumerate(found):
        needed = draft.total_bytes(context, room.device)
        if needed <= room.nbytes:
            found[place] = replace(room, nbytes=room.nbytes - needed)
            return found, room
    raise OutOfMemory(
        f"no device has {needed / GIB:.1f} GiB for the draft model {draft.folder.name}",
        hint="lower --context, or leave the draft model out",
    )


def check_split(split: str | None, device: str, backend: str) -> None:
    """Raise UsageError where gpu_split meets settings that say otherwise."""
    if split is None:
        return
    if device not in ("auto", "cuda"):
        raise UsageError(f"gpu_split chooses the devices, device is {device!r}", hint="leave one of them out")
    if backend not in ("auto", "cuda"):
        raise UsageError(f"gpu_split needs the backend cuda, not {backend!r}", hint="leave one of them out")
