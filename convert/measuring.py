"""The measuring stage: one pass forward, one back, a checkpoint per layer, and the file that later jobs reuse."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exl_runtime.errors import ConvertError

from .classic import Rows, measure_layer
from .forward import LayerForward, embed
from .measure import LayerProbe, Sensitivity, top_gradient
from .progress import Progress
from .source import Source
from .states import States
from .store import read_json, read_tensor, write_json, write_tensors
from .workspace import Workspace

FORMAT = "exl-runtime measurement"
VERSION = 1
TOKENS = 8192  # of the calibration rows that are measured on
LEAST_ROWS = 8
Measured = Sequence[Sensitivity] | Sequence[Rows]


def measuring_rows(rows: Tensor) -> Tensor:
    """An even choice of the calibration rows."""
    wanted = min(rows.shape[0], max(LEAST_ROWS, TOKENS // rows.shape[1]))
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
    missing = [i for i in range(layers) if not space.measured(i).exists()]
    if missing:
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
    if encoder == "classic":
        return tuple(Rows.from_json(name, entry, str(path)) for name, entry in entries.items())
    items = {name: Sensitivity.from_json(name, entry, str(path)) for name, entry in entries.items()}
    wanted = [slot for layer in source.spec.layers for slot in source.slots(layer.index)]
    if set(items) != {slot.path for slot in wanted}:
        raise ConvertError(f"{path}: the measurement lacks matrices of the model", hint="leave out --measurement")
    return tuple(items[slot.path] for slot in wanted)


def _best(source: Source, space: Workspace, rows: Tensor, *, chunk: int, seed: int, progress: Progress) -> None:
    """Forward through all layers keeping every layer's inputs, then back from the top, probing as it goes."""
    spec, device = source.spec, source.device
    count, length = rows.shape
    layers = len(spec.layers)
    start = min((i for i in range(layers) if space.measured(i).exists()), default=layers)  # from here up it is done
    inputs: list[States] = []
    shape = (count, length, spec.hidden_size)
    total = sum(len(source.slots(layer.index)) for layer in spec.layers)
    with progress.stage("measuring: forward", layers, "layers") as bar, torch.no_grad():
        states = space.scratch(shape, copies=layers + 4)
        table = source.embedding()
        for at in range(0, count, chunk):
            states.write(at, embed(spec, table, rows[at : at + chunk].to(device)))
        del table
        inputs.append(states)
        for layer in spec.layers[:start]:
            forward, w = LayerForward(spec, layer, length, device), source.layer(layer.index)
            after = space.scratch(shape, copies=layers + 4)
            for at in range(0, count, chunk):
                after.write(at, forward(inputs[-1].read(at, min(at + chunk, count)).to(device), w))
            inputs.append(after)
            bar.advance()
    gradient = _top(source, inputs[-1], chunk, seed) if start == layers else read_tensor(space.gradient(start), "g")
    with progress.stage("measuring widths", total, "matrices") as bar:
        bar.advance(sum(len(source.slots(i)) for i in range(start, layers)))
        for i in reversed(range(start)):
            forward = LayerForward(spec, spec.layers[i], length, device)
            probe = LayerProbe(forward, {slot.key: slot for slot in source.slots(i)}, source.layer(i), count)
            below = torch.empty(shape)
            for at in range(0, count, chunk):
                stop = min(at + chunk, count)
                below[at:stop] = probe.back(inputs[i].read(at, stop).to(device), gradient[at:stop].to(device)).cpu()
            found = {item.path: item.to_json() for item in probe.sensitivities(lambda path: bar.advance(note=path))}
            gradient = below
            write_tensors(space.gradient(i), {"g": gradient})
            write_json(space.measured(i), {"entries": found})
            space.gradient(i + 1).unlink(missing_ok=True)
            inputs[i].discard()
    for states in inputs:
        states.discard()


def _top(source: Source, states: States, chunk: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    norm, head = source.final_norm(), source.head()
    parts = []
    for at in range(0, states.rows, chunk):
        x = states.read(at, min(at + chunk, states.rows)).to(source.device)
        parts.append(top_gradient(source.spec, x, norm, head, generator).cpu())
    return torch.cat(parts)


def _classic(source: Source, space: Workspace, rows: Tensor, *, chunk: int, seed: int, progress: Progress) -> None:
    spec, device = source.spec, source.device
    x = embed(spec, source.embedding(), rows.to(device))
    with progress.stage("measuring exllamav2's options", 2 * len(spec.layers), "half layers") as bar:
        for layer in spec.layers:
            i = layer.index
            forward, w = LayerForward(spec, layer, rows.shape[1], device), source.layer(i)
            if space.measured(i).exists():
                with torch.no_grad():
                    x = torch.cat([forward(part, w) for part in x.split(chunk)])
                bar.advance(2)
                continue
            slots = {slot.key: slot for slot in source.slots(i)}
            attention, mlp, x = measure_layer(
                forward, slots, w, x, chunk=chunk, advance=lambda note: bar.advance(note=note)
            )
            write_json(space.measured(i), {"entries": {half.name: half.to_json() for half in (attention, mlp)}})
