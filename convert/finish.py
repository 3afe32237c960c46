"""The last stage: the folder is written beside its place, opened again and compared, and described."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl_runtime import __version__
from exl_runtime.checkpoint.header import read_header
from exl_runtime.checkpoint.reader import DTYPES
from exl_runtime.checkpoint.writer import Planned, read_tensor
from exl_runtime.console.progress import Progress
from exl_runtime.errors import ConvertError
from exl_runtime.files import PARTIAL, naming, write_bytes

from .checking import half
from .options import JobOptions
from .report import Divergence, MatrixReport, Report, write_report
from .source import Source
from .verify import Room, compare, require_sane
from .workspace import take_lock
from .write import copied_files, prepare_target, quantization_config, write_folder

# Files of a finished folder beside those copied from the source, and what trying to write leaves when it is killed.
_WRITTEN = re.compile(r"output(-\d+-of-\d+)?\.safetensors|(config|measurement)\.json|report\.(json|md|html)|probe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a finished conversion is described with."""

    options: JobOptions
    bits_target: float
    rows: int
    length: int
    dataset: str
    protocol: str
    held_out: Tensor
    matrices: tuple[MatrixReport, ...]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]


@contextmanager
def open_target(out: Path, source: Path) -> Iterator[Path]:
    """`<out>.partial`, for this process alone; what an error leaves in it is removed. `publish` gives it its name.

    Raises ConvertError before any work: see `prepare_target`; another process writes to it; it holds what no
    conversion puts there.
    """
    try:
        partial = prepare_target(out, source)
    except BaseException:
        with suppress(OSError, RuntimeError, ValueError):  # not even a path, or nothing was made
            out.resolve().with_name(out.resolve().name + PARTIAL).rmdir()
        raise
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        take_lock(descriptor, partial, "choose another name for the result")
        _clear(partial, source)
        try:
            yield partial
        except BaseException:
            with suppress(OSError):
                _clear(partial, source)
                partial.rmdir()
            raise
    finally:
        os.close(descriptor)


def _clear(partial: Path, source: Path) -> None:
    """Remove the files of a conversion from `partial`, if it is there. Raises ConvertError, first, for others."""
    with naming(partial):
        files = sorted(partial.iterdir()) if partial.is_dir() else []
    ours = {path.name for path in copied_files(source)}
    for path in files:
        name = path.name.removesuffix(PARTIAL)
        if not (path.is_file() and (name in ours or _WRITTEN.fullmatch(name))):
            raise ConvertError(
                f"{partial}: the result is written here first, but it holds {path.name}",
                hint="move that away, or choose another name for the result",
            )
    for path in files:
        with naming(path):
            path.unlink()


def finish(
    source: Source,
    partial: Path,
    files: Sequence[Path],
    measurement: Path,
    result: Result,
    *,
    chunk: int,
    room: Room,
    progress: Progress,
) -> Report:
    """Fill `partial` and check it: all but its name. files: the tensors of every layer and of the head.

    Raises ConvertError when the bytes on disk are not what was planned or the model does not work.
    """
    options = result.options
    planned = plan_tensors(source, files)
    with progress.stage("writing", len(planned), "tensors") as bar:
        written = write_folder(
            partial,
            source.folder,
            [_counted(entry, bar) for entry in planned],
            shard_bytes=options.shard_mb << 20,
            config=source.files.config,
            quantization=quantization_config(
                version=__version__,
                bits=result.bits_target,
                head_bits=options.head_bits,
                rows=result.rows,
                length=result.length,
                dataset=result.dataset,
            ),
        )
    write_bytes(partial / "measurement.json", measurement.read_bytes())
    stored = _stored_bits(partial, source)
    if stored > result.bits_target or (stored < result.bits_target - 0.01 and options.encoder == "best"):
        # Not wrong, but not what was promised: small models have few layouts to choose from.
        progress.say(f"stored: {stored:.4f} bits per weight for the {result.bits_target:g} wanted")
    divergence = _verified(source, partial, planned, result, chunk=chunk, room=room, progress=progress)
    report = Report(
        source=str(source.folder),
        settings=_settings(options),
        calibration=result.protocol,
        bits_target=result.bits_target,
        bits_stored=stored,
        head_bits=options.head_bits,
        bytes=sum(path.stat().st_size for path in written),
        seconds=result.seconds,
        matrices=result.matrices,
        divergence=(divergence,),
        warnings=result.warnings,
    )
    write_report(partial, report)
    return report


def plan_tensors(source: Source, files: Sequence[Path]) -> list[Planned]:
    """Every tensor of the finished folder, in the model's order: read from its checkpoint when its turn comes.

    The embedding table is the source's, rounded to half, unless one of the files holds another.
    """
    embedding = next(name for name, key in source.dense_tensors(None).items() if key == "embedding")
    planned = [
        Planned(
            name=info.name,
            dtype=DTYPES[info.dtype],
            shape=info.shape,
            make=lambda path=path, name=info.name: read_tensor(path, name),
        )
        for path in files
        for info in read_header(path)
    ]
    if all(entry.name != embedding for entry in planned):
        planned.append(
            Planned(
                name=embedding,
                dtype=torch.float16,
                shape=(source.embedding_rows, source.spec.hidden_size),
                make=lambda: half(source.embedding(), embedding),
            )
        )
    planned.sort(key=lambda entry: entry.name != embedding)  # first, as in the model
    for name in source.extra_tensors():
        dtype, shape = source.extra_info(name)
        floating = dtype.is_floating_point

        def make(name: str = name, floating: bool = floating) -> Tensor:
            found = source.extra(name)
            return half(found, name) if floating else found

        planned.append(Planned(name=name, dtype=torch.float16 if floating else dtype, shape=shape, make=make))
    return planned


def _counted(entry: Planned, bar) -> Planned:
    def make() -> Tensor:
        bar.advance(note=entry.name)
        return entry.make()

    return Planned(name=entry.name, dtype=entry.dtype, shape=entry.shape, make=make)


def _stored_bits(folder: Path, source: Source) -> float:
    """Bits per weight of the decoder layers' matrices, counted from the bytes in the written files."""
    prefixes = tuple(f"{slot.path}." for layer in source.spec.layers for slot in source.slots(layer.index))
    owners = dict.fromkeys(prefixes, 0)
    for path in sorted(folder.glob("output*.safetensors")):
        for info in read_header(path):
            owner = f"{info.name.rpartition('.')[0]}."
            if owner in owners:
                owners[owner] += info.nbytes
    return 8 * sum(owners.values()) / source.parameters


def _verified(
    source: Source,
    partial: Path,
    planned: Sequence[Planned],
    result: Result,
    *,
    chunk: int,
    room: Room,
    progress: Progress,
) -> Divergence:
    """Open the written folder as any reader would and run it beside the source."""
    with (
        progress.stage("verifying", 2 * len(source.spec.layers), "layers") as bar,
        Source.open(partial, source.device) as written,
    ):
        wanted = {(entry.name, entry.dtype, entry.shape) for entry in planned}
        headers = [info for path in partial.glob("*.safetensors") for info in read_header(path)]
        if odd := wanted ^ {(info.name, DTYPES[info.dtype], info.shape) for info in headers}:
            raise ConvertError(f"{partial}: the written folder is not what was planned: {min(map(str, odd))}")
        if written.formats != {"exl2"}:
            raise ConvertError(f"{partial}: the written folder holds other formats: {sorted(written.formats)}")
        divergence = compare(
            source,
            written,
            result.held_out,
            chunk=chunk,
            text=f"held-out rows, {result.dataset}",
            room=room,
            advance=lambda count: bar.advance(count),
        )
    require_sane(divergence, str(partial))
    return divergence


def _settings(options: JobOptions) -> dict[str, object]:
    return {
        "encoder": options.encoder,
        "bits": options.bits,
        "head bits": options.head_bits,
        "seed": options.seed,
        "shard size MB": options.shard_mb,
        "calibration": [path.name for path in options.calibration],
        "target vram": options.target_vram,
        "version": __version__,
    }
