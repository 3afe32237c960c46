"""One conversion from its options to a finished folder, and again from wherever it was interrupted.

Stages, each a set of checkpoints in the work folder: calibration rows -> measurement -> layouts -> encoded layers and
head -> tuning -> the folder. A stage whose files exist is not run again, so the same command goes on.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from exl_runtime.errors import ConvertError
from exl_runtime.model.placement import free_memory, resolve_device
from exl_runtime.ops import native

from . import allocate, classic, measuring, tuning
from .budget import bits_for_memory, describe, planned_context
from .calibration import Calibration, default_size
from .calibration import make as make_calibration
from .encoded import Layout, require_inputs
from .encoding import Job, encode_layers, reports
from .finish import Result, finish
from .layouts import head_option
from .options import JobOptions, load_job, validated, work_folder
from .progress import Progress
from .report import Divergence
from .resources import chunk_rows, require_disk, require_memory
from .source import Source
from .store import read_json, read_tensors, write_json, write_tensors
from .workspace import Workspace, open_workspace
from .write import prepare_target


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a conversion ended. folder None: only measured. bits_*: average of the decoder layers."""

    folder: Path | None
    measurement: Path
    bits_target: float
    bits_stored: float
    bytes: int
    seconds: float
    divergence: tuple[Divergence, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class _Run:
    options: JobOptions
    source: Source
    space: Workspace
    progress: Progress
    chunk: int
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.progress.warn(text)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 2)


def resume(work: Path, progress: Progress, options: JobOptions | None = None) -> Outcome:
    """Go on with the job in the folder `work`. `options`: with other places or devices than it was started with."""
    return run(validated(load_job(work)) if options is None else options, progress)


def run(options: JobOptions, progress: Progress) -> Outcome:
    """Do, or finish, what `options` (already validated) ask for. Every ExlError leaves finished work in place."""
    started = time.perf_counter()
    device = resolve_device(options.device)
    if options.threads is not None:
        native.set_threads(options.threads)
        torch.set_num_threads(options.threads)
    with Source.open(options.source, device) as source:
        _require_convertible(source, options)
        partial = None if options.measure_only else prepare_target(options.out, source.folder)
        try:
            memory = free_memory(device)
            with open_workspace(work_folder(options), options, source.identity(), memory) as space:
                chunk = chunk_rows(source.spec, _size(source, options)[1])
                state = _Run(options, source, space, progress, chunk)
                return _stages(state, partial, memory, started)
        finally:
            if partial is not None and partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()


def _stages(state: _Run, partial: Path | None, memory: int, started: float) -> Outcome:
    options, source, space = state.options, state.source, state.space
    rows, length = _size(source, options)
    _introduce(state)
    target = None if options.measure_only else _target(state)
    require_memory(source, rows, length, state.chunk, memory)
    require_disk(source, space.folder, None if partial is None else partial.parent, rows, length, target)
    with state.timed("calibration"):
        data = _calibration(state, rows, length, memory)
    with state.timed("measurement"):
        measured = _measured(state, data)
    if partial is None or target is None:
        seconds = time.perf_counter() - started
        return Outcome(
            folder=None,
            measurement=space.measurement,
            bits_target=0.0,
            bits_stored=0.0,
            bytes=0,
            seconds=seconds,
            warnings=tuple(state.warnings),
        )
    with state.timed("allocation"):
        layouts = _layouts(state, measured, target)
    with state.timed("encoding"):
        encode_layers(
            Job(
                source=source,
                space=space,
                rows=data.rows,
                layouts=layouts,
                encoder=options.encoder,
                chunk=state.chunk,
                progress=state.progress,
            )
        )
    with state.timed("tuning"):
        files, note = tuning.tuned_files(
            source, space, data, encoder=options.encoder, seed=options.seed, memory=memory, progress=state.progress
        )
    matrices = reports(source, space)
    flagged = [f"{matrix.path}: {flag}" for matrix in matrices for flag in matrix.flags]
    for text in flagged[:20]:
        state.warn(text)
    if len(flagged) > 20:
        state.warn(f"{len(flagged) - 20} further remarks about matrices stand in the report")
    result = Result(
        options=options,
        bits_target=target,
        rows=rows,
        length=length,
        dataset=data.dataset,
        protocol=data.protocol + note,
        held_out=data.held_out,
        matrices=matrices,
        seconds=state.seconds,
        warnings=tuple(state.warnings),
    )
    report = finish(
        source,
        partial,
        files,
        space.measurement,
        result,
        chunk=state.chunk,
        room=space.scratch,
        progress=state.progress,
    )
    space.remove()
    return Outcome(
        folder=options.out,
        measurement=options.out / "measurement.json",
        bits_target=target,
        bits_stored=report.bits_stored,
        bytes=report.bytes,
        seconds=time.perf_counter() - started,
        divergence=report.divergence,
        warnings=report.warnings,
    )


# --- before the work ------------------------------------------------------------------------------------------------


def _require_convertible(source: Source, options: JobOptions) -> None:
    for layer in source.spec.layers:
        for slot in source.slots(layer.index):
            require_inputs(slot.inputs, slot.path)
    require_inputs(source.head_slot.inputs, source.head_slot.path)
    for path in options.calibration:
        if not path.exists():
            raise ConvertError(f"{path}: no such file", hint="check the path after --calibration")
    if options.measurement is not None and not options.measurement.exists():
        raise ConvertError(f"{options.measurement}: no such file", hint="check the path after --measurement")


def _size(source: Source, options: JobOptions) -> tuple[int, int]:
    """(rows, length) of the calibration data."""
    rows, length = default_size(source.spec)
    if options.length is not None:
        length = options.length
        if length > source.spec.context_length:
            raise ConvertError(
                f"--length {length}: the model ends at {source.spec.context_length} tokens",
                hint=f"use --length {source.spec.context_length} or less",
            )
    return options.rows or rows, length


def _introduce(state: _Run) -> None:
    source, options = state.source, state.options
    for kind in sorted(source.formats - {"dense"}):
        state.warn(
            f"the source is quantized already ({kind.upper()}): what that lost stays lost, and this conversion loses "
            "some more; the original fp16 or bf16 model gives a better result"
        )
    limits = _limits(source, options)
    state.progress.say(
        f"{source.folder.name}: {source.spec.architecture}, {source.parameters / 1e6:,.1f}M weights in "
        f"{len(source.spec.layers)} layers; {limits.lowest:.3f} to {limits.highest:.3f} bits per weight can be reached"
    )


def _limits(source: Source, options: JobOptions) -> allocate.Range:
    slots = [slot for layer in source.spec.layers for slot in source.slots(layer.index)]
    if options.encoder == "classic":
        return classic.attainable([(slot.path, slot.inputs, slot.outputs, slot.biased) for slot in slots])
    return allocate.attainable([(slot.inputs, slot.outputs, slot.biased) for slot in slots])


def _target(state: _Run) -> float:
    """Bits per weight, given or computed; checked before any work. Raises ConvertError with the range."""
    options, source = state.options, state.source
    limits = _limits(source, options)
    if options.target_vram is None:
        assert options.bits is not None
        allocate.require_attainable(options.bits, limits)
        return options.bits
    budget = bits_for_memory(
        source.spec,
        memory=options.target_vram,
        context=planned_context(source.spec, options.context),
        cache=options.cache,
        head_bits=options.head_bits,
        embedding_rows=source.embedding_rows,
        parameters=source.parameters,
        lowest=limits.lowest,
        highest=limits.highest,
    )
    state.progress.say(describe(budget))
    return budget.bits


# --- stages ---------------------------------------------------------------------------------------------------------


def _calibration(state: _Run, rows: int, length: int, memory: int) -> Calibration:
    space = state.space
    if space.protocol.exists():
        tensors, about = read_tensors(space.calibration), read_json(space.protocol)
        return Calibration(
            rows=tensors["rows"],
            held_out=tensors["held_out"],
            dataset=str(about["dataset"]),
            protocol=str(about["protocol"]),
        )
    data = make_calibration(
        state.source,
        files=state.options.calibration,
        rows=rows,
        length=length,
        seed=state.options.seed,
        memory=int(memory * 0.8),
        progress=state.progress,
    )
    write_tensors(space.calibration, {"rows": data.rows, "held_out": data.held_out})
    write_json(space.protocol, {"dataset": data.dataset, "protocol": data.protocol})
    return data


def _measured(state: _Run, data: Calibration) -> measuring.Measured:
    options, space = state.options, state.space
    if options.measurement is not None:
        found = measuring.load(options.measurement, state.source, options.encoder)
        if not space.measurement.exists():
            write_json(space.measurement, read_json(options.measurement))
        return found
    if space.measurement.exists():
        return measuring.load(space.measurement, state.source, options.encoder)
    return measuring.measure(
        state.source,
        space,
        data.rows,
        encoder=options.encoder,
        chunk=state.chunk,
        seed=options.seed,
        protocol=data.protocol,
        dataset=data.dataset,
        progress=state.progress,
    )


def _layouts(state: _Run, measured: measuring.Measured, target: float) -> dict[str, Layout]:
    """path -> layout, the head's included; kept, so that a later version cannot choose others half-way."""
    space, source = state.space, state.source
    if space.layouts.exists():
        found = read_json(space.layouts)["layouts"]
        return {path: tuple((int(bits), int(rows)) for bits, rows in layout) for path, layout in found.items()}
    if state.options.encoder == "classic":
        layouts = dict(classic.choose(measured, target))
    else:
        chosen = allocate.allocate(measured, target)
        layouts = dict(chosen.layouts)
        state.progress.say(
            f"allocated {chosen.bits_per_weight:.4f} bits per weight; predicted divergence before corrections "
            f"{chosen.loss:.4f} nats per token"
        )
    head = source.head_slot
    layouts[head.path] = head_option(state.options.head_bits).layout(head.inputs)
    write_json(
        space.layouts, {"layouts": {path: [list(group) for group in layout] for path, layout in layouts.items()}}
    )
    return layouts
