"""One conversion from its options to a finished folder, and again from wherever it was interrupted.

Stages, each a set of checkpoints in the work folder: calibration rows -> measurement -> layouts -> encoded layers and
head -> tuning -> the folder. A stage whose files exist is not run again, so the same command goes on.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from exl_runtime.checkpoint.writer import read_tensors, write_tensors
from exl_runtime.console.progress import Progress
from exl_runtime.errors import ConvertError, ExlError
from exl_runtime.files import read_json, write_json
from exl_runtime.model.placement import free_memory, resolve_device
from exl_runtime.ops import native

from . import allocate, blocktune, classic, measuring, tuning
from .budget import bits_for_memory, describe, planned_context
from .calibration import Calibration, default_size
from .calibration import make as make_calibration
from .checking import check_weights
from .encoded import Layout, require_inputs
from .encoding import Job, encode_layers, reports
from .finish import Result, finish, open_target
from .layouts import head_option
from .options import JobOptions, load_job, validated, work_folder
from .report import Divergence, MatrixReport, from_json
from .resources import chunk_rows, require_disk, require_memory
from .source import Source
from .workspace import Workspace, open_workspace
from .write import publish

REMARKS = 20  # about single matrices that are shown; the others stand in the report


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
    """memory: bytes free on the device;  chunk: rows worked on at a time;  seconds: stage -> wall clock."""

    options: JobOptions
    source: Source
    space: Workspace
    progress: Progress
    memory: int
    chunk: int
    started: float
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
    options = load_job(work) if options is None else options
    if work_folder(options).resolve() != work.resolve():  # the folder was moved, or the result shall go elsewhere
        options = replace(options, work=work)
    return run(validated(options), progress)


def run(options: JobOptions, progress: Progress) -> Outcome:
    """Do, or finish, what `options` (already validated) ask for. Every ExlError leaves finished work in place."""
    started = time.perf_counter()
    device = resolve_device(options.device)
    if options.threads is not None:
        native.set_threads(options.threads)
        torch.set_num_threads(options.threads)
    with Source.open(options.source, device) as source:
        _require_convertible(source)
        host = free_memory(torch.device("cpu"))  # where hidden states are kept
        with open_workspace(work_folder(options), options, source.identity(), host) as space:
            chunk = chunk_rows(source.spec, _size(source, options)[1])
            state = _Run(options, source, space, progress, free_memory(device), chunk, started)
            try:
                return _convert(state)
            except ExlError:
                if space.begun:
                    progress.warn(f"finished work is kept in {space.folder}; the same command goes on from there")
                raise


def _convert(state: _Run) -> Outcome:
    options, space = state.options, state.space
    if options.measure_only:
        _introduce(state)
        _measured(state, _prepared(state, None, None))
        return Outcome(
            folder=None,
            measurement=space.measurement,
            bits_target=0.0,
            bits_stored=0.0,
            bytes=0,
            seconds=time.perf_counter() - state.started,
            warnings=tuple(state.warnings),
        )
    assert options.out is not None
    if not space.published(options.out):
        with open_target(options.out, state.source.folder) as partial:
            _fill(state, partial)
            space.announce(partial / "report.json")
            publish(partial, options.out)
    report = from_json(read_json(options.out / "report.json"))
    space.remove()
    return Outcome(
        folder=options.out,
        measurement=options.out / "measurement.json",
        bits_target=report.bits_target,
        bits_stored=report.bits_stored,
        bytes=report.bytes,
        seconds=time.perf_counter() - state.started,
        divergence=report.divergence,
        warnings=report.warnings,
    )


def _fill(state: _Run, partial: Path) -> None:
    """All stages; the finished model lies in `partial` then."""
    options, source, space = state.options, state.source, state.space
    _introduce(state)
    target = _target(state)
    data = _prepared(state, partial.parent, target)
    measured = _measured(state, data)
    with state.timed("allocation"):
        layouts = _layouts(state, measured, target)
    blocks = options.encoder == "best" and blocktune.decide(source, space, state.memory, *data.rows.shape)
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
                seed=options.seed if blocks else None,
            )
        )
    with state.timed("tuning"):
        files, note = tuning.tuned_files(
            source,
            space,
            data,
            encoder=options.encoder,
            seed=options.seed,
            memory=state.memory,
            progress=state.progress,
        )
    matrices = reports(source, space)
    _remark(state, matrices)
    result = Result(
        options=options,
        bits_target=target,
        rows=data.rows.shape[0],
        length=data.rows.shape[1],
        dataset=data.dataset,
        protocol=data.protocol + ("; layers tuned behind their encoding where that helped" if blocks else "") + note,
        held_out=tuning.judge_rows(data.held_out),
        matrices=matrices,
        seconds=state.seconds,
        warnings=tuple(state.warnings),
    )
    finish(
        source,
        partial,
        files,
        space.measurement,
        result,
        chunk=state.chunk,
        room=space.scratch,
        progress=state.progress,
    )


def _remark(state: _Run, matrices: Sequence[MatrixReport]) -> None:
    flagged = [f"{matrix.path}: {flag}" for matrix in matrices for flag in matrix.flags]
    for text in flagged[:REMARKS]:
        state.warn(text)
    if len(flagged) > REMARKS:
        state.warn(f"{len(flagged) - REMARKS} further remarks about matrices stand in the report")


# --- before the work ------------------------------------------------------------------------------------------------


def _require_convertible(source: Source) -> None:
    for layer in source.spec.layers:
        for slot in source.slots(layer.index):
            require_inputs(slot.inputs, slot.path)
    require_inputs(source.head_slot.inputs, source.head_slot.path)


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


def _prepared(state: _Run, out: Path | None, target: float | None) -> Calibration:
    """Everything is checked that can be known to fail; then the calibration data. `out` None: only measuring."""
    options, source, space = state.options, state.source, state.space
    rows, length = _size(source, options)
    if options.measurement is not None and not space.measurement.exists():
        measuring.load(options.measurement, source, options.encoder)
    require_memory(source, rows, length, state.chunk, state.memory)
    require_disk(source, space.folder, out, rows, length, target=target, head_bits=options.head_bits)
    if not space.calibrated:
        for path in options.calibration:
            if not path.exists():
                raise ConvertError(f"{path}: no such file", hint="check the path after --calibration")
        with (
            state.timed("checking"),
            state.progress.stage("checking the weights", len(source.spec.layers), "layers") as bar,
        ):
            check_weights(source, bar.advance)
    with state.timed("calibration"):
        return _calibration(state, rows, length)


# --- stages ---------------------------------------------------------------------------------------------------------


def _calibration(state: _Run, rows: int, length: int) -> Calibration:
    space = state.space
    if space.calibrated:
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
        memory=int(state.memory * 0.8),
        progress=state.progress,
    )
    write_tensors(space.calibration, {"rows": data.rows, "held_out": data.held_out})
    write_json(space.protocol, {"dataset": data.dataset, "protocol": data.protocol})
    return data


def _measured(state: _Run, data: Calibration) -> measuring.Measured:
    options, space = state.options, state.space
    if not space.measurement.exists() and options.measurement is not None:
        # Our own copy: the job goes on with it whatever becomes of the file.
        write_json(space.measurement, read_json(options.measurement))
    with state.timed("measurement"):
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
