"""A Transformer in stages on several devices, its cache in as many parts, and the way of activations between them.

To the generator it is one model and one cache. Who holds what was decided by `split.py`.
"""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cache.geometry import CacheGeometry
from ..cache.storage import KVStorage
from ..checkpoint.reader import Checkpoint
from ..config.spec import ModelSpec
from ..errors import NonFiniteError
from ..ops.attention.cuda import release
from ..ops.table import OpSet
from .batch import ForwardBatch, by_layer
from .block import Block
from .embedding import Embedding
from .fused import FusedTransformer, Layers
from .linear import Linear
from .loader import Progress, _Loader
from .split import Stage
from .transformer import Transformer, require_finite
from .weights import Weights

log = logging.getLogger(__name__)

Copy = Callable[[Tensor, torch.device], Tensor]
PATTERN = 1 << 18  # elements of the test of a copy: more than one packet of any link


class StageTransformer(Transformer):
    """Some of the blocks of a model, one after another. The embedding may be missing, and so may the end."""

    def begin(self, batch: ForwardBatch) -> Tensor:
        """See `FusedTransformer.begin`, as the next two."""
        return self.embedding(batch.tokens)

    def through(self, x: Tensor, batch: ForwardBatch, kv: Layers, *, check: bool) -> Tensor:
        """See `FusedTransformer.through`."""
        ropes = self._angles.of_all(batch)
        seen = by_layer(batch, kv.geometry)
        for block in self.blocks:
            x = block(x, seen[block.layer.index], ropes[block.layer.rope], *kv.layer(block.layer.index))
            if check:
                require_finite(x, f"layer {block.layer.index}")
        return x

    def finish(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """See `FusedTransformer.finish`."""
        spec = self.spec
        if batch.logit_rows.numel() != x.shape[0]:
            x = x.index_select(0, batch.logit_rows)
        x = self.ops.rms_norm(x, self.final_norm, spec.norm_eps, spec.norm_weight_offset)
        logits = self.head(x.to(self.dtype)).float()
        if spec.logit_scale != 1.0:
            logits.mul_(spec.logit_scale)
        if (cap := spec.logit_softcap) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits


@dataclass(slots=True)
class Part:
    """One stage, loaded. The embedding is there in the first, final norm and head in the last."""

    stage: Stage
    model: StageTransformer | FusedTransformer
    bridge: "Bridge | None" = None  # from the stage before

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        model = self.model
        linears = [linear for block in model.blocks for linear in block.linears]
        ends = [end for end in (model.embedding, model.head) if end is not None]
        return sum(part.nbytes for part in (*ends, *linears))


def _direct(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device)


class Bridge:
    """The way of a tensor from one device to another: straight, or by the host where a test copy comes out wrong.

    Some machines copy between GPUs without an error and deliver garbage (IOMMU settings, mixed cards): so a pattern is
    sent once, and compared on the host.
    """

    def __init__(self, source: torch.device, target: torch.device, *, copy: Copy = _direct) -> None:
        self.target = target
        self._copy = copy
        self.direct = source == target or "cpu" in (source.type, target.type) or self._works(source)
        if not self.direct:
            log.warning("copies from %s to %s arrive damaged; they go by way of the host", source, target)

    def __call__(self, x: Tensor) -> Tensor:
        """x on the target device."""
        return self._copy(x, self.target) if self.direct else x.cpu().to(self.target)

    def _works(self, source: torch.device) -> bool:
        pattern = torch.arange(PATTERN, dtype=torch.int32) * 2654435 + 12345
        try:
            arrived = self._copy(pattern.to(source), self.target)
            return torch.equal(arrived.cpu(), pattern)
        except RuntimeError:
            return False


class SplitCache:
    """Pages over several devices: page p of a sequence is page p of every part. Stands in for a `KVStorage`."""

    def __init__(self, geometry: CacheGeometry, pages: int | Sequence[int], stages: Sequence[Stage]) -> None:
        """`pages` as for `KVStorage`. Raises OutOfMemory when a part does not fit its device."""
        groups = geometry.groups
        self.geometry = geometry
        self.counts = (pages,) * len(groups) if isinstance(pages, int) else tuple(pages)
        self.pages = self.counts[0]
        self.page_size = geometry.page_size
        self.device = stages[0].device
        self._windows = [group.window for group in groups]
        self._parts = []
        for stage in stages:
            windows = geometry.windows[stage.first : stage.stop]
            part = replace(geometry, layers=stage.stop - stage.first, windows=windows)
            counts = [self.counts[self._windows.index(group.window)] for group in part.groups]
            self._parts.append(KVStorage(part, counts, stage.device))
        self._layers = [part.layer(i) for part in self._parts for i in range(part.geometry.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self._parts)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """See `KVStorage.layer`."""
        return self._layers[index]

    def copy_page(self, source: int, target: int, tokens: int, group: int = 0) -> None:
        """See `KVStorage.copy_page`."""
        for part in self._parts:
            windows = [own.window for own in part.geometry.groups]
            if self._windows[group] in windows:
                part.copy_page(source, target, tokens, windows.index(self._windows[group]))


class SplitTransformer:
    """Stands in for a `Transformer`. `device` is where batches come in."""

    def __init__(self, spec: ModelSpec, parts: Sequence[Part]) -> None:
        self.spec = spec
        self.parts = list(parts)
        self.device = parts[0].stage.device
        self.backend = "+".join(dict.fromkeys(part.stage.backend for part in parts))
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}  # page tables: the same for many passes

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as held in memory."""
        return sum(part.nbytes for part in self.parts)

    @property
    def blocks(self) -> list[Block]:
        """All layers, wherever they are."""
        return [block for part in self.parts for block in part.model.blocks]

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: Layers) -> Tensor:
        """See `Transformer.forward`; the logits are on the last device."""
        logits = self._run(batch, kv, check=False)
        if not torch.isfinite(logits.sum(dtype=torch.float64)):
            self._run(batch, kv, check=True)
            raise NonFiniteError("the logits contain NaN or infinity", hint="the output head or its scales are damaged")
        return logits

    def close(self) -> None:
        """Let go of all weights, and give the memory of the devices back."""
        devices = devices_of(self)
        self.parts.clear()
        self._moved.clear()
        free_devices(devices)

    def _run(self, batch: ForwardBatch, kv: Layers, *, check: bool) -> Tensor:
        x: Tensor | None = None
        for part in self.parts:
            here = self._on(batch, part.stage.device)
            if x is None:
                x = part.model.begin(here)
                if check:
                    require_finite(x, "the token embedding")
            elif part.bridge is not None:
                x = part.bridge(x)
            x = part.model.through(x, here, kv, check=check)
        assert x is not None
        return part.model.finish(x, here)

    def _on(self, batch: ForwardBatch, device: torch.device) -> ForwardBatch:
        if device == self.device:
            return batch
        known = self._moved.get(device)
        if known is None or known[0] is not batch.pages:
            known = self._moved[device] = (batch.pages, batch.pages.to(device))
        return replace(
            batch,
            positions=batch.positions.to(device),
            slots=batch.slots.to(device),
            q_starts=batch.q_starts.to(device),
            kv_lengths=batch.kv_lengths.to(device),
            pages=known[1],
            logit_rows=batch.logit_rows.to(device),
        )


def load_split(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    stages: Sequence[Stage],
    *,
    quantization: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    hurry: bool = False,
    progress: Progress | None = None,
) -> SplitTransformer:
    """Load each stage on its device; arguments and errors as in `loader.load_transformer`."""
    weights = Weights(checkpoint, spec, quantization)
    parts: list[Part] = []
    for number, stage in enumerate(stages):
        chosen = dtype or (torch.float16 if stage.backend == "cuda" else torch.float32)
        loader = _Loader(weights, stage.device, stage.backend, chosen, hurry)
        first, last = number == 0, number == len(stages) - 1
        table = loader.embedding() if first or last else None
        blocks = []
        for layer in spec.layers[stage.first : stage.stop]:
            blocks.append(loader.block(layer))
            if progress is not None:
                progress(stage.first + len(blocks), len(spec.layers))
        assert table is not None or not last
        model = make_part(
            spec=spec,
            embedding=table if first else None,
            blocks=blocks,
            final_norm=loader.norm(spec.names.final_norm, spec.hidden_size) if last else None,
            head=loader.head(table) if last and table is not None else None,
            ops=loader.ops,
            device=stage.device,
            dtype=loader.dtype,
            backend=stage.backend,
        )
        bridge = None if first else Bridge(stages[number - 1].device, stage.device)
        parts.append(Part(stage, model, bridge))
    return SplitTransformer(spec, parts)


def make_part(
    *,
    spec: ModelSpec,
    embedding: Embedding | None,
    blocks: list[Block],
    final_norm: Tensor | None,
    head: Linear | None,
    ops: OpSet,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> StageTransformer | FusedTransformer:
    """The blocks of one stage. What another stage has is None here, and never asked for."""
    kind = FusedTransformer if backend == "cuda" else StageTransformer
    return kind(
        spec=spec,
        embedding=embedding,  # type: ignore[arg-type]
        blocks=blocks,
        final_norm=final_norm,  # type: ignore[arg-type]
        head=head,  # type: ignore[arg-type]
        ops=ops,
        device=device,
        dtype=dtype,
        backend=backend,
    )


def devices_of(model: object) -> set[torch.device]:
    """The devices that hold weights of a model."""
    if isinstance(model, SplitTransformer):
        return {part.stage.device for part in model.parts}
    return {model.device} if isinstance(model, Transformer) else set()


def free_devices(devices: set[torch.device]) -> None:
    """Return what nobody uses of these GPUs' memory to the driver; cycles that hold tensors are collected first."""
    for device in devices:
        release(device)
    cards = [device for device in devices if device.type == "cuda"]
    if not cards:
        return
    gc.collect()
    for device in cards:
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
