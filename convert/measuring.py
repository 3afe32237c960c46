"""The measuring stage: one pass forward, one back, a checkpoint per layer, and the file that later jobs reuse."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exl_runtime.checkpoint.writer import read_tensor, write_tensors
from exl_runtime.console.progress import Progress
from exl_runtime.errors import ConvertError, NonFiniteError
from exl_runtime.files import read_json, write_json

from .classic import Rows, measure_layer
from .forward import LayerForward, embed
from .measure import LayerProbe, Sensitivity, top_gradient
from .resources import CHUNK_FLOATS, measured_rows
from .source import Source
from .states import States
from .streaming import fill, through
from .workspace import Workspace

FORMAT = "exl-runtime measurement"
VERSION = 1

Measured = Sequence[Sensitivity] | Sequence[Rows]


def measuring_rows(rows: Tensor) -> Tensor:
    """An even choice of the calibration rows."""
    wanted = measured_rows(*rows.shape)
    return rows[torch.arange(wanted) * (rows.shape[0] // wanted)]


def measure(
    source: Source,
    space: Workspace,
    rows: Tensor,
    *,
    encoder: str,
    chunk: int,
    seed: int,
    protocol: str,
    dataset: str,
    progress: Progress,
) -> Measured:
    """Measure what is not measured yet, write measurement.json. The same result after any interruption."""
    picked = measuring_rows(rows)
    layers = len(source.spec.layers)
    if not all(space.measured(i).exists() for i in range(layers)):
        run = _classic if encoder == "classic" else _best
        run(source, space, picked, chunk=chunk, seed=seed, progress=progress)
    entries: dict[str, Any] = {}
    for i in range(layers):
        entries.update(read_json(space.measured(i))["entries"])
    record = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": encoder,
        "model": source.identity(),
        "calibration": {"dataset": dataset, "protocol": protocol, "rows": picked.shape[0], "length": picked.shape[1]},
        "entries": entries,
    }
    write_json(space.measurement, record)
    return load(space.measurement, source, encoder)


def load(path: Path, source: Source, encoder: str) -> Measured:
    """A measurement.json. Raises ConvertError: not one, another model's, another encoder's, damaged."""
    found = read_json(path)
    if found.get("format") != FORMAT:
        theirs = "exllamav2's, whose options are tied over q, k, v and o" if "last_module_idx" in found else "no such"
        raise ConvertError(f"{path}: not a measurement of this program ({theirs} file)", hint="leave out --measurement")
    if found.get("version") != VERSION:
        raise ConvertError(f"{path}: written by another version", hint="measure again: leave out --measurement")
    if found.get("model") != source.identity():
        raise ConvertError(
            f"{path}: the measurement of another model than {source.folder}",
            hint="give the file of this model, or leave out --measurement",
        )
    if found.get("encoder") != encoder:
        raise ConvertError(
            f"{path}: measured for --encoder {found.get('encoder')}, not for {encoder}", hint="leave out --measurement"
        )
    entries = found.get("entries")
    if not isinstance(entries, dict):
        raise ConvertError(f"{path}: the measurement is damaged", hint="measure again: leave out --measurement")
    slots = [slot for layer in source.spec.layers for slot in source.slots(layer.index)]
    wanted = [(slot.path, slot.inputs, slot.outputs, slot.biased) for slot in slots]
    if encoder == "classic":
        halves = tuple(Rows.from_json(name, entry, str(path)) for name, entry in entries.items())
        _require_all(path, [slot for half in halves for slot in half.slots], wanted)
        return halves
    items = {name: Sensitivity.from_json(name, entry, str(path)) for name, entry in entries.items()}
    _require_all(path, [(item.path, item.inputs, item.outputs, item.biased) for item in items.values()], wanted)
    return tuple(items[slot.path] for slot in slots)


def _require_all(path: Path, found: Sequence[tuple[object, ...]], wanted: Sequence[tuple[object, ...]]) -> None:
    if sorted(found) != sorted(wanted):
        odd = min(set(found) ^ set(wanted), default=("one matrix twice",))[0]
        raise ConvertError(
            f"{path}: the measurement does not fit the model's matrices ({odd})", hint="leave out --measurement"
        )


def _best(source: Source, space: Workspace, rows: Tensor, *, chunk: int, seed: int, progress: Progress) -> None:
    """Forward through all layers keeping every layer's inputs, then back from the top, probing as it goes."""
    layers = len(source.spec.layers)
    start = _undone(space, layers)
    inputs = forward_states(source, space, rows, start, chunk, progress)
    # The gradient at the outputs of the layers below `start`, float32 (rows, length, hidden).
    gradient = top_gradients(source, inputs[-1], seed) if start == layers else read_tensor(space.gradient(start), "g")
    total = sum(len(source.slots(i)) for i in range(layers))
    with progress.stage("measuring widths", total, "matrices") as bar:
        bar.advance(sum(len(source.slots(i)) for i in range(start, layers)))
        for i in reversed(range(start)):
            inputs.pop().discard()
            gradient, found = _back(source, i, inputs[-1], gradient, chunk, lambda path: bar.advance(note=path))
            write_tensors(space.gradient(i), {"g": gradient})
            write_json(space.measured(i), {"entries": found})
            space.gradient(i + 1).unlink(missing_ok=True)
    inputs.pop().discard()


def _undone(space: Workspace, layers: int) -> int:
    """The layers below this one are to be measured; those from it on are done, and the gradient between is there."""
    start = layers
    while start > 0 and space.measured(start - 1).exists():
        start -= 1
    return start if start < layers and space.gradient(start).exists() else layers


@torch.no_grad()
def forward_states(
    source: Source, space: Workspace, rows: Tensor, stop: int, chunk: int, progress: Progress
) -> list[States]:
    """Hidden states before every layer up to `stop`, and behind the last one. NonFiniteError names a layer."""
    spec = source.spec
    count, length = rows.shape
    shape = (count, length, spec.hidden_size)
    copies = len(spec.layers) + 4
    with progress.stage("measuring: forward", stop, "layers") as bar:
        inputs = [space.scratch(shape, copies)]
        fill(inputs[0], spec, source.embedding(), rows, chunk)
        for i in range(stop):
            inputs.append(space.scratch(shape, copies))

            def check(x: Tensor, i: int = i) -> None:
                _require_finite(bool(torch.isfinite(x).all()), source, f"an output of layer {i}")

            forward = LayerForward(spec, spec.layers[i], length, source.device)
            # The weights live for the call only: never two layers at once.
            through(forward, source.layer(i), inputs[i], inputs[i + 1], chunk, check)
            bar.advance()
    return inputs


def _back(
    source: Source, i: int, inputs: States, gradient: Tensor, chunk: int, advance: Callable[[str], None]
) -> tuple[Tensor, dict[str, Any]]:
    """(gradient at the inputs of layer i, what was found for its matrices)"""
    spec, device, count = source.spec, source.device, inputs.rows
    forward = LayerForward(spec, spec.layers[i], inputs.shape[1], device)
    probe = LayerProbe(forward, {slot.key: slot for slot in source.slots(i)}, source.layer(i), count)
    below = torch.empty(inputs.shape)
    for at in range(0, count, chunk):
        stop = min(at + chunk, count)
        below[at:stop] = probe.back(inputs.read(at, stop).to(device), gradient[at:stop].to(device)).cpu()
    _require_finite(bool(torch.isfinite(below).all()), source, f"the gradient at layer {i}")
    found = {}
    for item in probe.sensitivities(advance):
        _require_finite(all(math.isfinite(sum(row)) for row in item.losses.values()), source, f"a loss of {item.path}")
        found[item.path] = item.to_json()
    return below, found


def _require_finite(finite: bool, source: Source, what: str) -> None:
    if not finite:
        raise NonFiniteError(
            f"{source.folder}: {what} is NaN or infinite on the calibration data",
            hint="the weights are damaged, or config.json is not theirs",
        )


def top_gradients(source: Source, states: States, seed: int) -> Tensor:
    """Gradient at the last hidden states, a row and few tokens of it at a time: logits are wide."""
    spec, generator = source.spec, torch.Generator().manual_seed(seed)
    norm, head = source.final_norm(), source.head()
    tokens = max(1, CHUNK_FLOATS // spec.vocab_size)
    parts = []
    for row in range(states.rows):
        x = states.read(row, row + 1).to(source.device)
        parts.append(
            torch.cat([top_gradient(spec, part, norm, head, generator).cpu() for part in x.split(tokens, dim=1)], dim=1)
        )
    return torch.cat(parts)


def _classic(source: Source, space: Workspace, rows: Tensor, *, chunk: int, seed: int, progress: Progress) -> None:
    """Forward only; every half layer tries the rows of its option table (`classic`)."""
    x = embed(source.spec, source.embedding(), rows.to(source.device))
    with progress.stage("measuring exllamav2's options", 2 * len(source.spec.layers), "half layers") as bar:
        for i in range(len(source.spec.layers)):
            x = _classic_layer(source, space, i, x, chunk, lambda note: bar.advance(note=note))


def _classic_layer(
    source: Source, space: Workspace, i: int, x: Tensor, chunk: int, advance: Callable[[str], None]
) -> Tensor:
    forward, w = LayerForward(source.spec, source.spec.layers[i], x.shape[1], source.device), source.layer(i)
    if space.measured(i).exists():
        advance(f"attention of layer {i}")
        with torch.no_grad():
            x = torch.cat([forward(part, w) for part in x.split(chunk)])
        advance(f"MLP of layer {i}")
        return x
    slots = {slot.key: slot for slot in source.slots(i)}
    attention, mlp, x = measure_layer(forward, slots, w, x, chunk=chunk, advance=advance)
    write_json(space.measured(i), {"entries": {part.name: part.to_json() for part in (attention, mlp)}})
    return x
