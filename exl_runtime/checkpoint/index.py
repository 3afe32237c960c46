"""The tensors of a model folder: which file holds what. Built from the headers of all files, before anything loads.

model.safetensors.index.json is not used to find tensors: EXL2 folders carry a stale one (formats/exl2.md 1), and
renamed files make any of them wrong. It only serves to notice shards that were not downloaded.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..config.read import read_object
from ..errors import CheckpointError, ConfigError
from .header import TensorInfo, read_header, short

__all__ = ["FolderIndex", "TensorInfo", "read_folder"]

INDEX_FILE = "model.safetensors.index.json"
# Not the model's weights: what a conversion leaves behind (calibration data, activations; formats/exl2.md), adapters.
WORK_FILES = frozenset(
    f"{name}.safetensors" for name in ("cal_data", "input_states", "hidden_states", "output_states", "adapter_model")
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})\.safetensors")
INCOMPLETE = "the download is incomplete; download the missing file"


@dataclass(frozen=True, slots=True)
class FolderIndex:
    """Every tensor of a folder by name, and the files they lie in (sorted by name)."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]


def read_folder(folder: Path) -> FolderIndex:
    """Check every weight file of a folder. Raises CheckpointError naming the file and the tensor at fault."""
    files = _weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for info in read_header(path):
            other = tensors.setdefault(info.name, info)
            if other is not info:
                raise CheckpointError(
                    f"tensor {short(info.name)} is in two files: {other.file} and {path.name}",
                    hint="remove the file that does not belong to this model",
                )
    if not tensors:
        raise CheckpointError(f"{files[0]}: holds no tensors", hint="download the file again")
    _require_all_shards(folder, files, tensors)
    return FolderIndex(folder=folder, files=tuple(files), tensors=tensors)


def _weight_files(folder: Path) -> list[Path]:
    try:
        names = sorted(child.name for child in folder.iterdir())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no such folder", hint="check the path of the model") from None
    except NotADirectoryError:
        raise CheckpointError(f"{folder}: a file, not a folder", hint="give the folder that holds it") from None
    except OSError as err:
        raise CheckpointError(f"{folder}: cannot be read: {err.strerror or err}", hint="check its permissions") from err
    # Names that begin with a dot are leftovers of downloads and of other systems' file managers.
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    model = [name for name in found if name not in WORK_FILES]
    # Some uploads add the same weights once more, under their author's own names.
    own = [name for name in model if not name.startswith("consolidated")]
    if chosen := own or model:
        return [folder / name for name in chosen]
    if "adapter_model.safetensors" in found:
        raise CheckpointError(
            f"{folder}: only an adapter (adapter_model.safetensors), no model",
            hint="merge it into its base model, and open the result",
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        raise CheckpointError(
            f"{folder}: only GGUF files ({short(gguf[0])}), no safetensors",
            hint="get the EXL2, GPTQ or safetensors version",
        )
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise CheckpointError(
            f"{folder}: only pickles ({short(pickles[0])}), no safetensors; pickles can run code and are refused",
            hint="get the safetensors version of this model, or convert it with transformers: save_pretrained(...)",
        )
    raise CheckpointError(f"{folder}: no weights (*.safetensors) in this folder", hint="check the path of the model")


def _require_all_shards(folder: Path, files: list[Path], tensors: dict[str, TensorInfo]) -> None:
    if any(name.endswith(".q_weight") for name in tensors):
        _require_counted(files)
        return
    listed = _listed(folder)
    present = {path.name for path in files}
    quantized = any(name.endswith(".qweight") for name in tensors)
    if not listed or (quantized and not any(name.endswith(".qweight") for name in listed)):
        # No index, or the one of the model before it was quantized.
        _require_counted(files)
        return
    absent = sorted((shard, name) for name, shard in listed.items() if shard not in present and name not in tensors)
    if absent:
        shard, name = absent[0]
        count = sum(other == shard for other, _ in absent)
        raise CheckpointError(
            f"{folder / short(shard)}: the file is missing; {count} tensors such as {short(name)} are in no other file",
            hint=INCOMPLETE,
        )


def _listed(folder: Path) -> dict[str, str]:
    """Tensor -> file name, as the index file has it; empty when there is none."""
    path = folder / INDEX_FILE
    try:
        index = read_object(path)
    except ConfigError as err:
        raise CheckpointError(
            err.problem, hint=f"download {INDEX_FILE} again, or delete it if all shards are here"
        ) from err
    if index is None:
        return {}
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(
            f'{path}: "weight_map" must map tensor names to file names',
            hint=f"download {INDEX_FILE} again, or delete it if all shards are here",
        )
    return {str(name): Path(shard).name for name, shard in listed.items()}


def _require_counted(files: Iterable[Path]) -> None:
    """Files named x-00002-of-00003.safetensors say themselves how many there must be."""
    sets: dict[tuple[str, str], dict[int, Path]] = {}
    for path in files:
        if match := _SHARD.fullmatch(path.name):
            sets.setdefault((match["stem"], match["total"]), {})[int(match["number"])] = path
    for (stem, total), found in sets.items():
        if len(found) >= int(total):
            continue
        first = 0 if 0 in found else 1
        number = next(n for n in range(first, int(total) + 1) if n not in found)
        some = next(iter(found.values()))
        missing = some.with_name(f"{stem}-{number:0{len(total)}d}-of-{total}.safetensors")
        raise CheckpointError(
            f"{missing}: the file is missing; {len(found)} of {int(total)} files are here", hint=INCOMPLETE
        )
