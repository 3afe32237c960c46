"""What one conversion is asked to do: checked before any work, kept in the work folder, compared when a job goes on.

Imports nothing heavy: `--help` must be instant.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from exl_runtime.config.fields import shown
from exl_runtime.console.sizes import size_text
from exl_runtime.errors import ConvertError, UsageError

ENCODERS = ("best", "classic")
CACHES = ("fp32", "fp16", "bf16", "q8", "q6", "k6v4", "q4")  # types of keys and values, by falling size
_CACHE = re.compile(r"fp32|fp16|bf16|q[864]|k[2-8]v[2-8]")  # all that a memory target can count with
MIN_ROWS = 4
LENGTHS = (32, 65536)  # tokens of a calibration row
MAX_THREADS = 4096
MAX_SHARD_MB = 2**20
JOB_FILE = "job.json"  # in the work folder: an object whose "options" is `to_json` of the job's options
WORK = ".work"

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
# The same tensors come out whatever these are: where files lie, what computes, where the job ends.
_NO_CHANGE = ("out", "work", "measure_only", "device", "threads")
_SPELLINGS = {"source": "in", "shard_mb": "shard-size"}  # the others are spelled like their fields
_AT_LEAST_ONE = "give --bits N, or --target-vram SIZE to have it computed"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """One conversion.

    source       folder of the model        out     folder to be made; None only with `measure_only`
    bits         average bits per weight of the decoder layers, as stored
    head_bits    setting of the output head, one of `layouts.HEAD_BITS`
    work         folder of the checkpoints; None: `work_folder`
    calibration  files of text; (): the source model writes its own
    rows, length of the calibration data, in rows and tokens; None: the default of the job
    measurement  measurement.json of an earlier job of the same model
    target_vram  bytes that weights, cache and working memory may take together; instead of `bits`
    context      tokens the cache shall hold (with target_vram); None: the default of `budget`
    cache        type of keys and values the runtime knows (with target_vram)
    encoder      "best" | "classic"
    shard_mb     most MiB of one weight file; 0: one file
    device       "auto" | "cpu" | "cuda" | "cuda:N"       threads   CPU threads; None: as many as torch takes
    """

    source: Path
    out: Path | None = None
    bits: float | None = None
    head_bits: int = 6
    work: Path | None = None
    calibration: tuple[Path, ...] = ()
    rows: int | None = None
    length: int | None = None
    measurement: Path | None = None
    measure_only: bool = False
    target_vram: int | None = None
    context: int | None = None
    cache: str = "fp16"
    encoder: str = "best"
    shard_mb: int = 8192
    seed: int = 0
    device: str = "auto"
    threads: int | None = None


def validated(options: JobOptions) -> JobOptions:
    """The same options with absolute paths. Raises UsageError for a value or a combination that cannot be.

    Whether the bits can be reached is a question to the model, and not asked here.
    """
    from .layouts import HEAD_BITS

    options = _absolute(options)
    _require_targets(options)
    if options.bits is not None and not 0 < options.bits < math.inf:
        raise UsageError(f"--bits {options.bits}: not a number of bits", hint="2.5, 4.0 or 6.0, for example")
    if options.head_bits not in HEAD_BITS:
        raise UsageError(
            f"--head-bits {options.head_bits}: not a setting of the format",
            hint=f"use one of {', '.join(map(str, HEAD_BITS))}",
        )
    _require_range("--rows", options.rows, MIN_ROWS, 2**24)
    _require_range("--length", options.length, *LENGTHS)
    _require_range("--context", options.context, 1, 2**31 - 1)
    _require_range("--threads", options.threads, 1, MAX_THREADS)
    _require_range("--shard-size", options.shard_mb, 0, MAX_SHARD_MB)
    _require_range("--seed", options.seed, 0, 2**63 - 1)
    if not _CACHE.fullmatch(options.cache):
        raise UsageError(
            f"--cache {shown(options.cache)}: no such type", hint=f"use one of {', '.join(CACHES)}, or another kXvY"
        )
    _require_one_of("--encoder", options.encoder, ENCODERS)
    if not _DEVICE.fullmatch(options.device):
        raise UsageError(f"--device {shown(options.device)}: no such device", hint="use auto, cpu, cuda or cuda:N")
    if options.target_vram is not None and options.target_vram <= 0:
        raise UsageError(f"--target-vram {options.target_vram}: no memory at all", hint="12GB, for example")
    _require_places(options)
    return options


def work_folder(options: JobOptions) -> Path:
    """Where the job keeps its checkpoints: --work, or `<OUT>.work` beside OUT. Raises UsageError without either."""
    if options.work is not None:
        return options.work
    if options.out is None or not options.out.name:
        raise UsageError("nowhere to work in", hint="give --work DIR, or the folder of the result with -o")
    return options.out.with_name(options.out.name + WORK)


def to_json(options: JobOptions) -> dict[str, object]:
    """Field name -> JSON value; paths as absolute strings."""
    return {field.name: _json(getattr(_absolute(options), field.name)) for field in fields(JobOptions)}


def from_json(value: object, *, where: str = JOB_FILE) -> JobOptions:
    """The inverse of `to_json`. Raises ConvertError, naming `where`, for anything that `to_json` does not return."""
    hint = "it was written by another version, or is damaged: start anew with another --work"
    known = {field.name: field.type for field in fields(JobOptions)}
    if not isinstance(value, Mapping) or set(value) != set(known):
        raise ConvertError(f"{where}: not the options of a job of this version", hint=hint)
    found: dict[str, object] = {}
    for name, kind in known.items():
        entry = value[name]
        if not _fits(entry, kind):
            raise ConvertError(f"{where}: {name} is {shown(entry)}", hint=hint)
        if isinstance(entry, list):
            found[name] = tuple(map(Path, entry))
        elif isinstance(entry, str) and Path in _kinds(kind):
            found[name] = Path(entry)
        else:
            found[name] = float(entry) if name == "bits" and entry is not None else entry
    return JobOptions(**found)  # type: ignore[arg-type]


def load_job(work: Path) -> JobOptions:
    """The options that the job in the folder `work` was started with. Raises ConvertError: no job, damaged file."""
    from exl_runtime.files import read_json

    path = work / JOB_FILE
    if not path.is_file():
        raise ConvertError(f"{work}: no job was started in this folder", hint=f"its {JOB_FILE} is missing")
    return from_json(read_json(path).get("options"), where=str(path))


def differences(old: JobOptions, new: JobOptions) -> list[str]:
    """ "bits: 4.0 when the job started, 3.5 now" for every option that changes the result, in the order of the fields.

    Not counted: where the result and the checkpoints lie, `measure_only`, device and threads.
    """
    found = []
    for field in fields(JobOptions):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name not in _NO_CHANGE and _identity(before) != _identity(after):
            name = spelling(field.name)
            found.append(f"{name}: {_human(field.name, before)} when the job started, {_human(field.name, after)} now")
    return found


def spelling(name: str) -> str:
    """The long option, without dashes, of a field: "target-vram" for "target_vram"."""
    return _SPELLINGS.get(name, name.replace("_", "-"))


def _require_targets(options: JobOptions) -> None:
    if options.out is None and not options.measure_only:
        raise UsageError("the folder for the result is missing", hint="give it with -o")
    if options.bits is not None and options.target_vram is not None:
        raise UsageError("--bits and --target-vram exclude each other", hint="give one of them")
    if options.bits is None and options.target_vram is None and not options.measure_only:
        raise UsageError("how many bits the result shall have is missing", hint=_AT_LEAST_ONE)
    if options.target_vram is None:
        for name, default in (("context", None), ("cache", "fp16")):
            if getattr(options, name) != default:
                raise UsageError(
                    f"--{name} is only used to compute the bits with --target-vram",
                    hint="leave it out, or give --target-vram instead of --bits",
                )
    if options.measure_only and options.measurement is not None:
        raise UsageError("--measure-only makes the measurement that --measurement gives", hint="leave out one of them")


def _require_places(options: JobOptions) -> None:
    from exl_runtime.files import PARTIAL

    work = work_folder(options)
    if options.out is not None and work == options.out.with_name(options.out.name + PARTIAL):
        raise UsageError(f"--work {work}: the result is written into a folder of this name", hint="use another one")
    places = {"--in": options.source, "--out": options.out, "--work": work}
    resolved = {name: Path(os.path.realpath(path)) for name, path in places.items() if path is not None}
    for inner, outer in (("--out", "--in"), ("--work", "--in"), ("--work", "--out"), ("--out", "--work")):
        if inner not in resolved or outer not in resolved:
            continue
        if resolved[inner] == resolved[outer]:
            raise UsageError(f"{inner} and {outer} are the same folder: {places[inner]}", hint="use two folders")
        if resolved[outer] in resolved[inner].parents:
            raise UsageError(f"{inner} {places[inner]} is inside {outer} {places[outer]}", hint="put it elsewhere")


def _require_range(flag: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise UsageError(f"{flag} {value}: wanted {low} to {high}")


def _require_one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{flag} {shown(value)}: not one of {', '.join(choices)}")


def _absolute(options: JobOptions) -> JobOptions:
    changed: dict[str, object] = {"calibration": tuple(map(_absolute_path, options.calibration))}
    for name in ("source", "out", "work", "measurement"):
        path = getattr(options, name)
        changed[name] = None if path is None else _absolute_path(path)
    return replace(options, **changed)  # type: ignore[arg-type]


def _absolute_path(path: Path) -> Path:
    """Links stay links, but a path with ".." only means something once they are followed."""
    try:
        if "\0" in str(path):
            raise ValueError("it holds a null byte")
        return path.resolve() if ".." in path.parts else path.absolute()
    except (OSError, RuntimeError, ValueError) as err:  # RuntimeError: a loop of links
        raise UsageError(f"{shown(str(path))}: not a path: {err}") from err


def _json(value: object) -> object:
    if isinstance(value, tuple):
        return [str(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _kinds(annotation: object) -> tuple[object, ...]:
    return getattr(annotation, "__args__", None) or (annotation,)


def _fits(value: object, annotation: object) -> bool:
    """Whether a JSON value is what `to_json` writes for a field of this type."""
    if annotation == tuple[Path, ...]:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    kinds = _kinds(annotation)
    if value is None:
        return type(None) in kinds
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, str):
        return str in kinds or Path in kinds
    return (isinstance(value, int) and (int in kinds or float in kinds)) or (
        isinstance(value, float) and float in kinds
    )


def _identity(value: object) -> object:
    """Equal for two spellings of one path."""
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return os.path.realpath(value) if isinstance(value, Path) else value


def _human(name: str, value: object) -> str:
    if value is None or value == ():
        return "not given"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if name == "target_vram" and isinstance(value, int):
        return f"{size_text(value)} ({value} bytes)"
    return str(value)
