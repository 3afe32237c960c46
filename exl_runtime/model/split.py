"""One model over several devices: what each holds is decided here, from headers and free memory, before anything loads.

Layers go to the GPUs in order, as many as fit beside their keys and values; what no GPU has room for runs on the CPU.
The embedding belongs to the first device, the final norm and the output head to the last. Loads nothing: see
`split_model.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..cache.geometry import PAGE_SIZE, free_memory
from ..cache.types import CacheType
from ..checkpoint.reader import Checkpoint
from ..config.names import Source
from ..config.spec import LayerSpec, MlpSpec, ModelSpec
from ..errors import OutOfMemory, UsageError
from ..ops.linear.workspace_cuda import workspace_bytes
from .placement import geometry_of, working_bytes
from .summary import stored_bits

GIB = 1 << 30
USABLE = 0.92  # of a GPU's free memory: allocators round up, and kernels have workspaces of their own
SLACK = 1.03  # matrices take a little more in memory than on disk
HOST_RESERVE = 1 << 30  # of host memory, left to the system
LEAST_CONTEXT = 2048  # tokens whose keys and values are planned for when the context is "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of the parts of one model: weights as stored, keys and values for the planned tokens, activations."""

    embedding: int
    layers: tuple[int, ...]
    head: int
    cache_per_layer: int
    working: int  # with the workspace of the CUDA kernels

    def stage(self, first: int, stop: int) -> int:
        """Of the layers first ... stop - 1 on one device, with the ends of the model that go with them."""
        count = len(self.layers)
        ends = (self.embedding if first == 0 else 0) + (self.head if stop == count else 0)
        weights = int((sum(self.layers[first:stop]) + ends) * SLACK)
        return weights + (stop - first) * self.cache_per_layer + self.working


@dataclass(frozen=True, slots=True)
class Room:
    """A device that may take part: which kernels run there, and the bytes a stage may take."""

    device: torch.device
    backend: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers first ... stop - 1 on one device."""

    device: torch.device
    backend: str
    first: int
    stop: int
    nbytes: int  # what it is expected to take

    def __str__(self) -> str:
        return f"layers {self.first} to {self.stop - 1} on {self.device} ({self.nbytes / GIB:.1f} GiB)"


def parse_split(text: str) -> tuple[float, ...] | None:
    """ "auto" -> None; "20,24" -> GiB for the first GPU, the second ... Raises UsageError."""
    if text == "auto":
        return None
    try:
        amounts = tuple(float(part) for part in text.split(","))
    except ValueError:
        amounts = ()
    if not amounts or not all(0 <= amount < 1 << 20 for amount in amounts) or not any(amounts):
        raise UsageError(
            f"gpu_split is {text!r}", hint='use "auto", or GiB for each GPU in order, as in "20,24"; 0 leaves one out'
        )
    return amounts


def rooms(
    split: str,
    gpus: Sequence[torch.device],
    *,
    free: Callable[[torch.device], int] = free_memory,
    gpu_backend: str = "cuda",
    host: Room | None = None,
) -> list[Room]:
    """The devices that may take part, in order; the host is always the last, for what the GPUs cannot hold.

    split  see `parse_split`            gpus  all there are, in order
    host   None: the CPU with its own kernels and the memory that is free
    Raises UsageError when more GPUs are named than there are, or none is there.
    """
    amounts = parse_split(split)
    if not gpus:
        raise UsageError("gpu_split needs a GPU, there is none", hint="leave it out; `exl doctor` says what was found")
    if amounts is None:
        found = [Room(gpu, gpu_backend, int(free(gpu) * USABLE)) for gpu in gpus]
    else:
        if len(amounts) > len(gpus):
            raise UsageError(
                f"gpu_split names {len(amounts)} GPUs, this machine has {len(gpus)}", hint="give one number for each"
            )
        wanted = [(gpu, int(amount * GIB)) for gpu, amount in zip(gpus, amounts, strict=False) if amount]
        found = [Room(gpu, gpu_backend, min(nbytes, int(free(gpu) * USABLE))) for gpu, nbytes in wanted]
    cpu = torch.device("cpu")
    return [*found, host or Room(cpu, "cpu", max(0, free(cpu) - HOST_RESERVE))]


def plan_stages(sizes: Sizes, available: Sequence[Room]) -> tuple[Stage, ...]:
    """Stages in the order of the layers; devices without a layer do not appear.

    Raises OutOfMemory when even the last device, with all that is left, has too little room.
    """
    count, first = len(sizes.layers), 0
    stages: list[Stage] = []
    for place, room in enumerate(available):
        stop = first
        while stop < count and sizes.stage(first, stop + 1) <= room.nbytes:
            stop += 1
        last = place == len(available) - 1
        if last and stop < count:
            raise OutOfMemory(
                f"the model needs {_gib(sizes.stage(0, count))} of memory; with everything else full, "
                f"{count - first} of its {count} layers are left for {room.device}, which need "
                f"{_gib(sizes.stage(first, count))} where {_gib(room.nbytes)} are free",
                hint="lower --context, choose a smaller cache type (--cache q4), or a model of fewer bits",
            )
        if stop > first:
            stages.append(Stage(room.device, room.backend, first, stop, sizes.stage(first, stop)))
            first = stop
    return tuple(stages)


def measure(checkpoint: Checkpoint, spec: ModelSpec, *, cache: CacheType, context: int | None) -> Sizes:
    """The sizes of a model, from the headers of an open checkpoint.

    context  tokens of keys and values to plan for; None: up to LEAST_CONTEXT, more if there is room later
    """
    tokens = min(spec.context_length, LEAST_CONTEXT) if context is None else context
    geometry = geometry_of(spec, cache)
    pages = geometry.pages_for(tokens) + 1  # a shared page is copied before a second sequence writes to it
    names = spec.names
    embedding = _bytes(checkpoint, tuple(Source(path=path) for path in names.embedding))
    head = _bytes(checkpoint, tuple(Source(path=path) for path in names.head))
    return Sizes(
        embedding=embedding,
        layers=tuple(_layer_bytes(checkpoint, spec, layer) for layer in spec.layers),
        head=head or embedding,  # the table serves as head, from a copy of its own
        cache_per_layer=pages * geometry.bytes_per_page // geometry.layers,
        working=working_bytes(spec) + workspace_bytes(_widest(spec)),
    )


def context_for(
    spec: ModelSpec,
    stages: Sequence[Stage],
    *,
    cache: CacheType,
    free: Callable[[torch.device], int] = free_memory,
    share: float = 0.8,
) -> int:
    """The longest context, up to the model's own, for which every stage has room now. Call after loading.

    Raises OutOfMemory when not even one page fits somewhere.
    """
    geometry = geometry_of(spec, cache)
    per_layer = geometry.bytes_per_page // geometry.layers
    fitting = []
    for stage in stages:
        left = int((free(stage.device) - working_bytes(spec)) * share)
        pages = left // (per_layer * (stage.stop - stage.first)) - 1
        if pages < 1:
            raise OutOfMemory(
                f"{_gib(free(stage.device))} are free on {stage.device}: too little for keys and values of "
                f"{stage.stop - stage.first} layers",
                hint="give less to this device with --gpu-split, or choose a smaller cache type (--cache q4)",
            )
        fitting.append(pages)
    return min(spec.context_length, min(fitting) * PAGE_SIZE)


def _widest(spec: ModelSpec) -> int:
    """Inputs of the widest matrix."""
    return max(spec.hidden_size, spec.heads * spec.head_dim, *(layer.mlp.intermediate_size for layer in spec.layers))


def _layer_bytes(checkpoint: Checkpoint, spec: ModelSpec, layer: LayerSpec) -> int:
    names, i = spec.names, layer.index
    sources = [names.linear(i, part) for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    parts = ("gate_proj", "up_proj", "down_proj")
    if isinstance(layer.mlp, MlpSpec):
        sources += [names.linear(i, part) for part in parts]
    else:
        sources.append(names.router(i))
        sources += [names.expert_linear(i, expert, part) for expert in range(layer.mlp.experts) for part in parts]
    return sum(_bytes(checkpoint, candidates) for candidates in sources)


def _bytes(checkpoint: Checkpoint, candidates: tuple[Source, ...]) -> int:
    found = stored_bits(checkpoint, candidates)
    return 0 if found is None else int(found[0] / 8)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"
