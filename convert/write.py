"""The finished EXL2 folder: weights in shards, config.json, and what else the source folder holds for a reader.

Everything is written into `<target>.partial` beside the target, which takes the target's name at the very end. Knows
no model and no encoder: tensors come as plans (`store.Planned`) and are made one at a time.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from exl_runtime.checkpoint.header import short
from exl_runtime.checkpoint.writer import Planned, write_planned
from exl_runtime.errors import ConvertError
from exl_runtime.files import PARTIAL, naming, remove_partials, require_space, sync_folder, write_json
from exl_runtime.files import write_pieces as write_file

COPY_BYTES = 1 << 20  # of a file held in memory while it is copied
SINGLE = "output.safetensors"
_OURS = re.compile(r"output(-\d{5,}-of-\d{5,})?\.safetensors")
# Weights in any container, and archives and data sets: nothing a reader of the EXL2 folder looks for.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".h5", ".msgpack", ".ot", ".npz", ".npy", ".tflite", ".mlmodel", ".index.json"),
    *(".zip", ".tar", ".gz", ".tgz", ".xz", ".7z", ".parquet", ".arrow"),
)
# What describes other weights than those written here, and what a conversion leaves behind.
_STALE = frozenset(
    (
        *("config.json", "quantize_config.json", "quant_config.json", "adapter_config.json"),
        *("measurement.json", "report.json", "report.md", "report.html"),
    )
)
_NOT_A_FOLDER = "give the folder that holds config.json"


def quantization_config(
    *, version: str, bits: float, head_bits: int, rows: int, length: int, dataset: str
) -> dict[str, object]:
    """The `quantization_config` of an EXL2 model (formats/exl2.md 1.1). bits: requested average of the layers."""
    calibration = {"rows": rows, "length": length, "dataset": dataset}
    return {
        "quant_method": "exl2",
        "version": version,
        "bits": float(bits),
        "head_bits": head_bits,
        "calibration": calibration,
    }


def prepare_target(target: Path, source: Path) -> Path:
    """Everything about `target` that can fail is tried before any work. Returns `<target>.partial`, which then exists.

    Raises ConvertError: the target is the source or inside it, exists with content, cannot be made or written to.
    """
    target, source = _resolved(target), _resolved(source)
    if target == source:
        raise ConvertError(f"{target}: the target is the source folder", hint="give another folder for the result")
    if source in target.parents:
        raise ConvertError(f"{target}: inside the source folder {source}", hint="give a folder outside of it")
    _require_free(target)
    if os.path.ismount(target):
        raise ConvertError(f"{target}: the top folder of a disk cannot be replaced", hint="give a folder inside it")
    copied_files(source)
    partial = target.with_name(target.name + PARTIAL)
    with naming(partial):
        partial.mkdir(parents=True, exist_ok=True)
    write_file(partial / "probe", (b"",))  # permissions say less than trying: read-only disks, quotas
    with naming(partial):
        (partial / "probe").unlink()
    return partial


def write_folder(
    target: Path,
    source: Path,
    tensors: Sequence[Planned],
    *,
    shard_bytes: int,
    config: Mapping[str, object],
    quantization: Mapping[str, object],
) -> list[Path]:
    """Write a complete EXL2 folder into `target` (made when missing). Returns the weight files, in order.

    tensors       all of the model, under their on-disk names, in the order they shall be made
    shard_bytes   most data bytes of one file; a larger tensor gets a file of its own; 0: one file
    config        the source's config.json; only its dtype (all weights are halves) and `quantization_config` change
    Weight files of an earlier, interrupted attempt are removed first. Raises ConvertError; errors of `make` pass.
    """
    shards = plan_shards(tensors, shard_bytes)
    copies = copied_files(source)
    with naming(target):
        target.mkdir(parents=True, exist_ok=True)
        for path in target.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
    remove_partials(target)
    needed = sum(entry.nbytes for entry in tensors) + sum(path.stat().st_size for path in copies)
    require_space(target, needed, "the finished model")
    written = []
    for name, shard in shards:
        write_planned(target / name, shard, {"format": "pt"})
        written.append(target / name)
    for path in copies:
        write_file(target / path.name, _content(path))
    # Last, because a folder without it is taken for a model by nobody.
    write_json(target / "config.json", {**_half(config), "quantization_config": dict(quantization)})
    return written


def publish(partial: Path, target: Path) -> None:
    """Give the finished folder its name; an empty folder of that name is replaced.

    Raises ConvertError when the target meanwhile exists with content or the rename fails; nothing is touched then.
    """
    target = _resolved(target)
    if not partial.is_dir():
        raise ConvertError(f"{partial}: no such folder", hint="was it moved, or published already?")
    _require_free(target)
    with naming(target):
        os.rename(partial, target)
        sync_folder(target.parent)


def plan_shards(tensors: Sequence[Planned], shard_bytes: int) -> list[tuple[str, list[Planned]]]:
    """(file name, its tensors): filled in order, no tensor split. Raises ValueError for two tensors of one name."""
    if len({entry.name for entry in tensors}) != len(tensors):
        raise ValueError("two tensors have the same name")
    shards: list[list[Planned]] = [[]]
    filled = 0
    for entry in tensors:
        if shard_bytes and shards[-1] and filled + entry.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    if len(shards) == 1:
        return [(SINGLE, shards[0])]
    total = len(shards)
    return [(f"output-{number:05d}-of-{total:05d}.safetensors", shard) for number, shard in enumerate(shards, 1)]


def copied_files(source: Path) -> list[Path]:
    """The files of the source folder that go into the result as they are, sorted by name; links count as their content.

    Not among them: weights and their indexes, archives, config.json (rewritten), descriptions of other quantizations,
    hidden files, folders. Raises ConvertError when the folder or one of the files cannot be read.
    """
    found = []
    try:
        names = sorted(os.listdir(source))
    except OSError as err:
        raise ConvertError(f"{source}: cannot be read: {err.strerror or err}", hint=_NOT_A_FOLDER) from err
    for name in names:
        lower = name.lower()
        if lower.startswith(".") or lower in _STALE or lower.endswith((*_WEIGHTS, PARTIAL)):
            continue
        path = source / name
        try:
            mode = path.stat().st_mode
        except OSError as err:
            why = "a link to a file that does not exist" if path.is_symlink() else err.strerror or err
            raise ConvertError(f"{short(str(path))}: {why}", hint="download the file again, or remove it") from err
        if not stat.S_ISREG(mode):
            continue
        if not os.access(path, os.R_OK):
            raise ConvertError(f"{short(str(path))}: no permission to read it", hint="change its permissions")
        found.append(path)
    return found


def _half(config: Mapping[str, object]) -> dict[str, object]:
    """The config, every dtype it states (its parts may state their own) being float16."""
    changed: dict[str, object] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = "float16"
        else:
            changed[key] = _half(value) if isinstance(value, Mapping) else value
    return changed


def _content(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while piece := file.read(COPY_BYTES):
                yield piece
    except OSError as err:
        raise ConvertError(f"{path}: cannot be read: {err.strerror or err}", hint="check the disk") from err


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as err:  # a loop of links, a null byte
        raise ConvertError(f"{short(str(path))}: not a path to write to: {err}", hint="choose another folder") from err


def _require_free(target: Path) -> None:
    """ConvertError unless nothing or an empty folder has this name."""
    try:
        content = os.listdir(target)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ConvertError(f"{target}: a file has this name, or is on its path", hint="choose another name") from None
    except OSError as err:
        raise ConvertError(f"{target}: cannot be read: {err.strerror or err}", hint="choose another folder") from err
    if content:
        raise ConvertError(
            f"{target}: exists and is not empty (it holds {short(min(content))}); nothing is overwritten",
            hint="choose another name, or remove it",
        )
