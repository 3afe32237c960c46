"""The last stage: the folder is written beside its place, opened again and compared, described, and only then named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl_runtime import __version__
from exl_runtime.checkpoint.header import read_header
from exl_runtime.checkpoint.reader import DTYPES
from exl_runtime.errors import ConvertError, NonFiniteError

from .options import JobOptions
from .progress import Progress
from .report import Divergence, MatrixReport, Report, write_report
from .source import Source
from .store import Planned, read_tensor, write_bytes
from .verify import Room, compare, require_sane
from .write import publish, quantization_config, write_folder


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
    """Write `partial`, check it, give it its name. files: the tensors of every layer and of the head.

    Raises ConvertError when the bytes on disk are not what was planned or the model does not work; nothing is
    published then.
    """
    options = result.options
    assert options.out is not None
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
    if not result.bits_target - 0.01 <= stored <= result.bits_target + 1e-9 and options.encoder == "best":
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
    publish(partial, options.out)
    return report


def plan_tensors(source: Source, files: Sequence[Path]) -> list[Planned]:
    """Every tensor of the finished folder, in the model's order: read from its checkpoint when its turn comes."""
    embedding = next(name for name, key in source.dense_tensors(None).items() if key == "embedding")
    planned = [
        Planned(
            name=embedding,
            dtype=torch.float16,
            shape=(source.embedding_rows, source.spec.hidden_size),
            make=lambda: half(source.embedding(), embedding),
        )
    ]
    for path in files:
        for info in read_header(path):
            planned.append(
                Planned(
                    name=info.name,
                    dtype=DTYPES[info.dtype],
                    shape=info.shape,
                    make=lambda path=path, name=info.name: read_tensor(path, name),
                )
            )
    for name in source.extra_tensors():
        tensor = source.extra(name)
        dtype = torch.float16 if tensor.dtype.is_floating_point else tensor.dtype
        shape = tuple(tensor.shape)

        def make(name: str = name, dtype: torch.dtype = dtype) -> Tensor:
            found = source.extra(name)
            return half(found, name) if dtype == torch.float16 else found

        planned.append(Planned(name=name, dtype=dtype, shape=shape, make=make))
    return planned


def half(tensor: Tensor, name: str) -> Tensor:
    """Rounded to half precision; NonFiniteError when it does not fit."""
    rounded = tensor.half()
    if not torch.isfinite(rounded).all():
        raise NonFiniteError(f"{name}: has values beyond half precision, which is all EXL2 can store (largest 65504)")
    return rounded


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
        names = {entry.name for entry in planned}
        if len(written.formats - {"exl2"}):
            raise ConvertError(f"{partial}: the written folder holds other formats than EXL2: {written.formats}")
        found = {info.name for path in partial.glob("output*.safetensors") for info in read_header(path)}
        if found != names:
            raise ConvertError(f"{partial}: the written folder lacks {sorted(names - found)[:1]}")
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
