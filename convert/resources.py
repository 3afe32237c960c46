"""How much memory and disk a conversion takes, checked before it starts. Estimates err on the safe side."""

from pathlib import Path

from exl_runtime.config import MlpSpec, ModelSpec
from exl_runtime.errors import OutOfMemory

from .source import Source
from .states import ITEM
from .store import require_space

CHUNK_FLOATS = 1 << 24  # values of the widest activation that are worked on at a time
BASE = 600 << 20  # the process itself
GIB = 2**30


def widest(spec: ModelSpec) -> int:
    """Columns of the widest activation inside a layer."""
    inner = max(layer.mlp.intermediate_size for layer in spec.layers)
    return max(spec.hidden_size, spec.heads * spec.head_dim, inner)


def chunk_rows(spec: ModelSpec, length: int) -> int:
    """Rows of `length` tokens worked on at a time."""
    return max(1, CHUNK_FLOATS // (length * widest(spec)))


def require_memory(source: Source, rows: int, length: int, chunk: int, memory: int) -> None:
    """OutOfMemory unless the largest layer with all its helpers fits into `memory` bytes.

    Counted: the layer twice in float32 (source and result), one matrix four times (target, codes, trials), moments and
    factors of the widest input in float64, and a dozen activations of a chunk.
    """
    spec = source.spec
    layer = max(source.layer_bytes(layer.index) for layer in spec.layers)
    slots = [slot for entry in spec.layers[:1] for slot in source.slots(entry.index)]
    matrix = max(ITEM * slot.inputs * slot.outputs for slot in slots)
    inputs = max(slot.inputs for slot in slots)
    moments = 8 * inputs * inputs * 7
    experts = 0 if isinstance(spec.layers[0].mlp, MlpSpec) else GIB
    activations = 12 * ITEM * chunk * length * widest(spec)
    head = ITEM * spec.vocab_size * spec.hidden_size * 4
    needed = BASE + max(2 * layer + 4 * matrix + moments + experts + activations, head + activations)
    if needed > memory:
        raise OutOfMemory(
            f"converting {source.folder.name} takes about {needed / GIB:.1f} GiB of memory, {memory / GIB:.1f} GiB are "
            "free",
            hint="close other programs, or use a machine with more memory",
        )


def require_disk(source: Source, work: Path, out: Path | None, rows: int, length: int, target: float | None) -> None:
    """ConvertError unless the checkpoints and the finished folder fit on their disks."""
    spec = source.spec
    states = ITEM * rows * length * (4 * spec.hidden_size + 2 * widest(spec))
    bits = 8.0 if target is None else target
    weights = int(source.parameters * bits / 8 + source.head_parameters * 9 / 8)
    dense = 2 * source.embedding_rows * spec.hidden_size
    require_space(work, states + (weights if out is not None else 0), "the work folder")
    if out is not None:
        same = _device(work) == _device(out)
        require_space(out, weights + dense + (states + weights if same else 0), "the finished model")


def _device(folder: Path) -> int:
    place = folder.absolute()
    return next(path for path in (place, *place.parents) if path.exists()).stat().st_dev
