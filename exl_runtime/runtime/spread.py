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
from ..model.placement import cache_pages, geometry_of, working_bytes
from ..model.split import GIB, LEAST_CONTEXT, Room, Stage, context_for, measure, plan_stages, rooms
from ..model.split_model import SplitCache, SplitTransformer, load_split
from .draft import DraftNeeds, draft_geometry


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

    def free(device: torch.device, working: int = 0) -> int:
        """Bytes for keys and values; beside a draft model `working` bytes more, elsewhere they are among them."""
        if draft is None or beside is None or device != beside.device:
            return free_memory(device)
        own = [stage.stop - stage.first for stage in stages if stage.device == device]
        page = geometry_of(spec, cache).bytes_per_page * max(1, sum(own)) // len(spec.layers)
        return draft.left(spec, page, device) + working

    length = context
    if length is None:
        length = context_for(spec, stages, cache=cache, free=lambda device: free(device, working_bytes(spec)))
    geometry = geometry_of(spec, cache, length)
    if draft is not None and beside is not None and draft_geometry(draft.folder, geometry, beside.device) is None:
        geometry = geometry_of(spec, cache)  # what one of the models still sees has to stay for both
    # Spare pages would have to fit everywhere: what the tightest device has room for.
    each = (cache_pages(geometry, length, device=stage.device, free=free(stage.device)) for stage in stages)
    pages = tuple(min(counts) for counts in zip(*each, strict=True))
    return Spread(model, SplitCache(geometry, pages, stages), length, stages, beside)


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
