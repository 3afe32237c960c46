"""The encoding stage: layer after layer, each one a checkpoint together with the hidden states behind it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl_runtime.checkpoint.writer import read_tensor, read_tensors, write_tensors
from exl_runtime.config import ModelSpec
from exl_runtime.console.progress import Progress
from exl_runtime.files import PARTIAL, read_json, write_json
from exl_runtime.ops.norm import rms_norm

from . import fisher
from .blocktune import tune_layer
from .checking import half
from .encoded import Encoded, Layout, stored_bits
from .encoder import BEST, CLASSIC, Recipe
from .forward import LayerForward
from .layerpass import Encoding, LayerPass, Plan, encode_matrix
from .layouts import describe
from .moments import Moments
from .report import MatrixReport
from .source import HEAD, Source
from .states import States
from .streaming import fill
from .workspace import Workspace

STREAMS = ("source", "result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the stage needs to know. layouts: path -> layout, the head's included.

    seed  of the tuning of every layer behind its encoding (`blocktune`; only with the encoder `best`); None: none
    """

    source: Source
    space: Workspace
    rows: Tensor
    layouts: Mapping[str, Layout]
    encoder: str
    chunk: int
    progress: Progress
    seed: int | None = None

    @property
    def recipe(self) -> Recipe:
        """Of the encoder."""
        return CLASSIC if self.encoder == "classic" else BEST

    @property
    def correct(self) -> bool:
        """Whether a second, unquantized stream runs beside."""
        return self.encoder != "classic"


@torch.no_grad()
def encode_layers(job: Job) -> None:
    """Encode every layer and the head that is not yet. Raises what reading and writing raise."""
    spec, space = job.source.spec, job.space
    layers = len(spec.layers)
    todo = next((i for i in range(layers) if not space.encoded(i)), layers)
    if todo == layers and space.encoded(None):
        return
    todo = _where_states_are(job, todo)
    if job.seed is not None and todo < layers:
        fisher.collect(job.source, space, job.rows, job.chunk, job.seed, job.progress)
    total = sum(len(job.source.slots(layer.index)) for layer in spec.layers) + 1
    with job.progress.stage("encoding", total, "matrices") as bar:
        bar.advance(sum(len(job.source.slots(i)) for i in range(todo)))
        states = _begin(job, todo)
        for i in range(todo, layers):
            states = _layer(job, i, states, lambda path: bar.advance(note=path))
        _head(job, states)
        bar.advance(note=HEAD)
        for held in states.values():
            held.discard()


def _where_states_are(job: Job, layer: int) -> int:
    """The last layer up to `layer` with hidden states before it; 0, whose are the embeddings, when there is none."""
    return next((i for i in range(layer, 0, -1) if all(path.exists() for path in _paths(job, i).values())), 0)


def _paths(job: Job, layer: int) -> dict[str, Path]:
    return {name: job.space.states(layer, name) for name in (STREAMS if job.correct else STREAMS[1:])}


def _begin(job: Job, layer: int) -> dict[str, States]:
    """Hidden states before `layer`: from the checkpoint, or the embeddings. Those of other layers are removed."""
    spec, paths = job.source.spec, _paths(job, layer)
    shape = (*job.rows.shape, spec.hidden_size)
    for path in (job.space.folder / "states").glob("*"):
        if path not in paths.values():
            path.unlink()
    if all(path.exists() for path in paths.values()):
        return {name: States(shape, path, existing=True) for name, path in paths.items()}
    table = job.source.embedding()
    made = {}
    for name, path in paths.items():
        held = States(shape, _partial(path))
        used = table if name == "source" else half(table, "the embedding table").float()
        fill(held, spec, used, job.rows, job.chunk)
        held.commit(path)
        made[name] = held
    return made


def _layer(job: Job, i: int, states: dict[str, States], advance: Callable[[str], None]) -> dict[str, States]:
    """Encode layer i. Its files are written last: first the states behind it, so that a layer that exists is done."""
    source, space = job.source, job.space
    shape = next(iter(states.values())).shape
    slots = {slot.key: slot for slot in source.slots(i)}
    weights = source.layer(i)
    after = {name: _copy(states[name], _partial(path), job.chunk) for name, path in _paths(job, i + 1).items()}
    run = LayerPass(
        forward=LayerForward(source.spec, source.spec.layers[i], shape[1], source.device),
        slots=slots,
        weights=weights,
        plan=Plan(
            layouts={key: job.layouts[slot.path] for key, slot in slots.items()},
            recipe=job.recipe,
            correct=job.correct,
            chunk=job.chunk,
        ),
        source=after.get("source", after["result"]),
        quantized=after["result"],
        keep=lambda width: space.scratch((shape[0], shape[1], width)),
        advance=advance,
    )
    done = run.run()
    if job.seed is not None:
        tune_layer(run, states["result"], read_tensor(space.fisher(i), "fisher"), seed=job.seed)
    for name, path in _paths(job, i + 1).items():
        after[name].commit(path)
    _save(space, source, i, done, run.result)
    for held in states.values():
        held.discard()
    return after


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _copy(held: States, path: Path, chunk: int) -> States:
    """The states a layer works on, beside the checkpoint it started from."""
    fresh = States(held.shape, path)
    for at in range(0, held.rows, chunk):
        fresh.write(at, held.read(at, min(at + chunk, held.rows)))
    return fresh


def _head(job: Job, states: dict[str, States]) -> None:
    started = time.perf_counter()
    source, spec = job.source, job.source.spec
    slot = source.head_slot
    norm = source.final_norm()
    stored = half(norm, "the final norm").float()
    moments = head_moments(spec, states["result"], stored, job.chunk, states.get("source"), norm)
    encoding = encode_matrix(source.head(), moments, job.layouts[slot.path], job.recipe, correct=job.correct)
    encoding.seconds = time.perf_counter() - started
    _save(job.space, source, None, {HEAD: encoding}, {"final_norm": stored})


def head_moments(
    spec: ModelSpec, result: States, stored: Tensor, chunk: int, source: States | None, norm: Tensor
) -> Moments:
    """Moments of what goes into the head. stored, norm: final norm (hidden,) of the result and of the source.

    source None: nothing is corrected.
    """

    def read(states: States, weight: Tensor, at: int) -> Tensor:
        x = states.read(at, min(at + chunk, states.rows)).to(weight.device)
        return rms_norm(x, weight, spec.norm_eps, spec.norm_weight_offset)

    moments = Moments(spec.hidden_size, stored.device)
    for at in range(0, result.rows, chunk):
        moments.add(read(result, stored, at), None if source is None else read(source, norm, at))
    return moments


def _save(
    space: Workspace, source: Source, layer: int | None, done: Mapping[str, Encoding], values: Mapping[str, Tensor]
) -> None:
    slots = source.layer_slots(layer)
    notes = {}
    for slot in slots:
        encoding, weights = done[slot.key], slot.inputs * slot.outputs
        bits = stored_bits(encoding.encoded.layout, slot.inputs, slot.outputs, biased=slot.biased)
        notes[slot.path] = {
            "bits_per_weight": bits / weights,
            "layout": describe(encoding.encoded.layout),
            "error": encoding.error if math.isfinite(encoding.error) else None,
            "flags": list(encoding.flags),
            "seconds": encoding.seconds,
            "weights": weights,
        }
    write_json(space.notes(layer), {"matrices": notes})
    encoded = {slot.path: done[slot.key].encoded for slot in slots}
    write_tensors(space.layer(layer), stored_tensors(source, layer, encoded, values))


def stored_tensors(
    source: Source, layer: int | None, encoded: Mapping[str, Encoded], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """On-disk name -> tensor of one layer; None: of what lies outside the layers.

    encoded  path -> matrix
    values   key -> norm, router or bias, as in `Source.layer`; "final_norm", "embedding". Dense tensors without a
             value are left out. All are rounded to half.
    """
    tensors: dict[str, Tensor] = {}
    for slot in source.layer_slots(layer):
        bias = values[f"{slot.key}.bias"] if slot.biased else None
        for suffix, tensor in encoded[slot.path].tensors(bias, where=slot.path).items():
            tensors[f"{slot.path}.{suffix}"] = tensor.cpu()
    for name, key in source.dense_tensors(layer).items():
        if key in values:
            value = values[key].t() if key == "router" else values[key]
            tensors[name] = half(value, name).cpu().contiguous()
    return tensors


def load_layer(source: Source, space: Workspace, layer: int | None) -> tuple[dict[str, Encoded], dict[str, Tensor]]:
    """The inverse of `stored_tensors`, of a finished layer: (path -> matrix, key -> float32 value), on the device."""
    stored = {name: tensor.to(source.device) for name, tensor in read_tensors(space.layer(layer)).items()}
    names = {key: name for name, key in source.dense_tensors(layer).items() if name in stored}
    values = {key: stored[name].float() for key, name in names.items()}
    if "router" in values:
        values["router"] = values["router"].t().contiguous()
    encoded = {}
    for slot in source.layer_slots(layer):
        prefix = f"{slot.path}."
        group = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
        encoded[slot.path] = Encoded.from_tensors(group, slot.outputs, where=slot.path)
        if slot.biased:
            values[f"{slot.key}.bias"] = group["bias"][: slot.outputs].float()
    return encoded, values


def reports(source: Source, space: Workspace) -> tuple[MatrixReport, ...]:
    """How every matrix went, in the model's order, the head last."""
    found = []
    for layer in (*range(len(source.spec.layers)), None):
        for path, note in read_json(space.notes(layer))["matrices"].items():
            error = math.nan if note["error"] is None else note["error"]
            found.append(MatrixReport(path=path, **{**note, "error": error, "flags": tuple(note["flags"])}))
    return tuple(found)
