"""Reads a LoRA adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors. Knows no kernels.

Layout facts (peft 0.21, `get_peft_model_state_dict`); names begin with "base_model.model." and the path of a module:
* .lora_A.weight (rank, in), .lora_B.weight (out, rank): scale * B A x is added to the module's output; with lora_bias
  also scale * .lora_B.bias (out,). Some writers leave the adapter's own name between: ".lora_A.default.weight".
* .lora_magnitude_vector (out,): DoRA. The module's matrix becomes magnitude * (W + scale B A) / norm, the norm being
  that of each row of W + scale B A.
* .lora_embedding_A (rank, vocab), .lora_embedding_B (hidden, rank): the same for a table, without ".weight".
* .weight, .bias: a module that was trained whole (modules_to_save, bias); ".base_layer" before it where it is adapted
  besides. A weight behind ".base_layer" is the base model's own, which peft stores with adapted embeddings.
* .token_adapter.trainable_tokens_delta (n, hidden): the rows of single tokens (trainable_token_indices).
* Bare 3-D parameters (target_parameters) of one module hide in each other: experts.lora_A is one,
  experts.base_layer.lora_A the other. E experts lie together, A as (E * rank, in) expert after expert, B as
  (out, rank * E) with the expert last.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from torch import Tensor

from ..checkpoint.header import read_header, short
from ..checkpoint.index import FolderIndex
from ..checkpoint.reader import Checkpoint
from ..config.fields import Fields
from ..config.read import read_object
from ..errors import AdapterError
from .adapter_config import MERGE, Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
PREFIX = "base_model.model."
BASE = ".base_layer"
# What a tensor is, by the end of its name; the first that fits.
_KINDS = {
    kind: re.compile(r"(?P<path>.+?)" + end)
    for kind, end in {
        "lora_A": r"\.lora_A(?:\.(?!weight$)[^.]+)?\.weight",
        "lora_B": r"\.lora_B(?:\.(?!weight$)[^.]+)?\.weight",
        "lora_B.bias": r"\.lora_B(?:\.(?!bias$)[^.]+)?\.bias",
        "lora_magnitude_vector": r"\.lora_magnitude_vector(?:\.[^.]+){0,2}",
        "lora_embedding_A": r"\.lora_embedding_A(?:\.(?!weight$)[^.]+)?",
        "lora_embedding_B": r"\.lora_embedding_B(?:\.(?!weight$)[^.]+)?",
        "tokens": r"\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?",
        "bias": rf"(?:\{BASE})*\.bias",
        "base": rf"(?:\{BASE})+\.weight",
        "weight": r"\.weight",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Delta:
    """What one module gets added: scale * up @ down, as stored: down (rank, in), up (out, rank).

    bias       (out,) or None: scale * bias is added too
    magnitude  (out,) or None: DoRA
    table      the module is an embedding: `in` are tokens
    """

    path: str
    down: Tensor
    up: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    table: bool


@dataclass(frozen=True, slots=True)
class Replaced:
    """A module trained whole: its matrix, its bias, or with `tokens` those rows of a matrix."""

    path: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """bases: path -> shape of a base model's own matrix stored along; digest: 16 bytes for everything in the files."""

    folder: Path
    settings: Settings
    deltas: tuple[Delta, ...]
    replaced: tuple[Replaced, ...]
    bases: dict[str, tuple[int, ...]]
    digest: bytes


def read_adapter(folder: Path) -> AdapterFiles:
    """Read and check the two files of `folder`.

    Raises AdapterError for what is missing, unknown, contradictory or not supported, ConfigError for damaged JSON,
    CheckpointError for a damaged file of weights; each names the file or the tensor.
    """
    _require_files(folder)
    raw = read_object(folder / CONFIG)
    if raw is None:
        raise AdapterError(f"{folder}: no {CONFIG} in this folder", hint="give the folder that peft wrote")
    settings = Settings(Fields(raw, str(folder / CONFIG)))
    path = folder / WEIGHTS
    infos = {info.name: info for info in read_header(path)}
    deltas: list[Delta] = []
    replaced: list[Replaced] = []
    bases: dict[str, tuple[int, ...]] = {}
    with Checkpoint(FolderIndex(folder, (path,), infos)) as tensors:
        for module, names in _modules(tensors).items():
            if "base" in names:
                bases[module] = _flat(tensors, names.pop("base"), 2)
            if names.keys() & {"weight", "bias", "tokens"}:
                replaced += _replaced(tensors, names, module, settings)
            if names:
                deltas.append(_delta(tensors, names, module, settings))
    return AdapterFiles(folder, settings, tuple(deltas), tuple(replaced), bases, _digest(folder))


def _require_files(folder: Path) -> None:
    if folder.is_file():
        hint = "pickles can run code and are refused" if folder.suffix != ".safetensors" else "give its folder"
        raise AdapterError(f"{folder} is a file, an adapter is a folder with {CONFIG} and {WEIGHTS}", hint=hint)
    if not folder.is_dir():
        raise AdapterError(f"there is no folder {folder}", hint="nothing is downloaded: fetch the adapter first")
    if (folder / WEIGHTS).is_file():
        return
    if pickle := next((name for name in PICKLES if (folder / name).exists()), None):
        raise AdapterError(
            f"{folder}: only a pickle ({pickle}), no {WEIGHTS}; pickles can run code and are refused",
            hint="save the adapter again with peft: save_pretrained(..., safe_serialization=True)",
        )
    raise AdapterError(f"{folder}: no {WEIGHTS} in this folder", hint="give the folder that peft wrote")


def _modules(tensors: Checkpoint) -> dict[str, dict[str, str]]:
    """Module path -> kind -> tensor name, sorted by path."""
    modules: dict[str, dict[str, str]] = {}
    for name in sorted(tensors.names):
        found = ((kind, ending.fullmatch(name.removeprefix(PREFIX))) for kind, ending in _KINDS.items())
        kind, match = next(((kind, match) for kind, match in found if match is not None), ("", None))
        if match is None:
            raise AdapterError(f"{tensors.where(name)} is neither of lora_A.weight and lora_B.weight", hint=MERGE)
        names = modules.setdefault(match["path"], {})
        if other := names.get(kind):
            raise AdapterError(f"{tensors.where(name)} and {short(other)} are for the same module")
        names[kind] = name
    if not modules:
        raise AdapterError(f"{tensors.folder / WEIGHTS}: holds no tensors", hint="download the file again")
    return modules


def _replaced(tensors: Checkpoint, names: dict[str, str], path: str, settings: Settings) -> list[Replaced]:
    """Takes what it reads out of `names`."""
    found = {}
    # A norm is refused later, by what it is.
    for kind, dims in (("weight", 1 if path.endswith("norm") else 2), ("bias", 1), ("tokens", 2)):
        if kind in names:
            _flat(tensors, names[kind], dims)
            found[kind] = tensors.tensor(names.pop(kind))
    replaced = []
    if "weight" in found or "bias" in found:
        replaced.append(Replaced(path, found.get("weight"), found.get("bias")))
    if (rows := found.get("tokens")) is not None:
        replaced.append(Replaced(path, rows, None, settings.tokens(path, rows.shape[0])))
    return replaced


def _flat(tensors: Checkpoint, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor, which has to have so many dimensions."""
    shape = tuple(tensors.info(name).shape)
    if len(shape) != dims or not all(shape):
        raise AdapterError(
            f"{tensors.where(name)}: shape {shape}, wanted {dims} dimension{'s' * (dims > 1)}, none empty"
        )
    return shape


def _delta(tensors: Checkpoint, names: Mapping[str, str], path: str, settings: Settings) -> Delta:
    table = any("embedding" in kind for kind in names)
    first, second = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A", "lora_B")
    some = tensors.where(next(iter(names.values())))
    wanted = {first, second}
    wanted |= {"lora_magnitude_vector"} if settings.dora else set()
    wanted |= {"lora_B.bias"} if settings.biased and not table else set()
    if missing := sorted(wanted - names.keys()):
        raise AdapterError(f"{some} has no {missing[0]} beside it", hint="download it again")
    if extra := sorted(names.keys() - wanted):
        raise AdapterError(f"{tensors.where(names[extra[0]])}: {settings.where} knows nothing of a {extra[0]}")
    down, up = (tensors.tensor(names[half]) for half in (first, second))
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise AdapterError(
            f"{tensors.where(names[first])}: shape {tuple(down.shape)}, and {tuple(up.shape)} of {second}: "
            "wanted (rank, in) and (out, rank)"
        )
    vectors: dict[str, Tensor] = {}
    for kind in sorted(names.keys() - {first, second}):
        vectors[kind] = vector = tensors.tensor(names[kind])
        if tuple(vector.shape) != (up.shape[0],):
            raise AdapterError(f"{tensors.where(names[kind])}: shape {tuple(vector.shape)}, wanted ({up.shape[0]},)")
    return Delta(path, down, up, vectors.get("lora_B.bias"), vectors.get("lora_magnitude_vector"), table)


def _digest(folder: Path) -> bytes:
    total = blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 20):
                total.update(piece)
    return total.digest()
