"""How much memory and disk a conversion takes, checked before it starts. Estimates err on the safe side."""

from pathlib import Path

from exl_runtime.config import MlpSpec, ModelSpec
from exl_runtime.errors import OutOfMemory
from exl_runtime.files import GIB, require_space

from .encoded import stored_bits
from .layouts import head_option
from .moments import WIDE
from .source import Source
from .states import ITEM

CHUNK_FLOATS = 1 << 24  # values of the widest activation that are worked on at a time
BASE = 600 << 20  # the process itself
MEASURED = 8192  # tokens of the calibration rows that are measured on, or
LEAST_ROWS = 8  # so many rows


def widest(spec: ModelSpec) -> int:
    """Columns of the widest activation inside a layer."""
    inner = max(layer.mlp.intermediate_size for layer in spec.layers)
    return max(spec.hidden_size, spec.heads * spec.head_dim, inner)


def chunk_rows(spec: ModelSpec, length: int) -> int:
    """Rows of `length` tokens worked on at a time."""
    return max(1, CHUNK_FLOATS // (length * widest(spec)))


def measured_rows(rows: int, length: int) -> int:
    """How many of the calibration rows are measured on."""
    return min(rows, max(LEAST_ROWS, MEASURED // length))


def require_memory(source: Source, rows: int, length: int, chunk: int, memory: int) -> None:
    """OutOfMemory unless the largest layer with all its helpers fits into `memory` bytes.

    Counted: the layer twice in float32 (source and result), one matrix eight times (residuals and targets in float64,
    codes, trials), moments and factors of the widest input (seven matrices), a dozen activations of a chunk, gradients
    of the rows measured on.
    """
    needed = memory_needed(source, rows, length, chunk)
    if needed > memory:
        raise OutOfMemory(
            f"converting {source.folder.name} takes about {needed / GIB:.1f} GiB of memory, {memory / GIB:.1f} GiB are "
            "free",
            hint="close other programs, or use a machine with more memory; a smaller --length needs a little less",
        )


def memory_needed(source: Source, rows: int, length: int, chunk: int) -> int:
    """Bytes; see `require_memory`."""
    spec = source.spec
    slots = [slot for layer in spec.layers for slot in source.slots(layer.index)]
    layer = max(source.layer_bytes(layer.index) for layer in spec.layers)
    matrix = max(ITEM * slot.inputs * slot.outputs for slot in slots)
    inputs = max(slot.inputs for slot in slots)
    moments = 7 * inputs * inputs * (8 if inputs < WIDE else 4)
    experts = 0 if all(isinstance(layer.mlp, MlpSpec) for layer in spec.layers) else GIB
    activations = 12 * ITEM * chunk * length * widest(spec)
    gradients = 2 * ITEM * measured_rows(rows, length) * length * spec.hidden_size
    head = 4 * ITEM * max(spec.vocab_size, source.embedding_rows) * spec.hidden_size
    return BASE + activations + gradients + max(2 * layer + 8 * matrix + moments + experts, head)


def require_disk(
    source: Source, work: Path, out: Path | None, rows: int, length: int, *, target: float | None, head_bits: int
) -> None:
    """ConvertError unless the checkpoints and the finished folder (None: only measuring) fit on their disks.

    What an earlier run of the job left counts as free: its files are part of what is needed.
    """
    spec = source.spec
    measured = measured_rows(rows, length) * length
    states = ITEM * measured * spec.hidden_size * (len(spec.layers) + 3)
    result = 0
    if out is not None and target is not None:
        slot = source.head_slot
        head = stored_bits(head_option(head_bits).layout(slot.inputs), slot.inputs, slot.outputs) // 8
        weights = int(source.parameters * target / 8) + head
        result = weights + 2 * source.embedding_rows * spec.hidden_size + source.extra_bytes
        states = max(states, ITEM * rows * length * (4 * spec.hidden_size + 2 * widest(spec))) + weights
        states += ITEM * spec.hidden_size**2 * len(spec.layers)  # Fisher information
    states = max(0, states - _size(work))
    if out is None or _device(work) != _device(out):
        require_space(work, states, "the work folder")
        states = 0
    if out is not None:
        require_space(out, result + states, f"the finished model{' with the work folder' if states else ''}")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def _device(folder: Path) -> int:
    place = folder.absolute()
    return next(path for path in (place, *place.parents) if path.exists()).stat().st_dev
