"""Reads a LoRA adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors. Knows no kernels.

Layout facts (peft 0.17, `LoraConfig` and `get_peft_model_state_dict`):
* A tensor is named "base_model.model." + the path of the module + ".lora_A.weight" or ".lora_B.weight"; some writers
  leave the adapter's own name between: ".lora_A.default.weight".
* A is (rank, in_features), B is (out_features, rank); what is added to the module's output is scale * B A x.
* scale is lora_alpha / rank, or lora_alpha / sqrt(rank) with use_rslora. rank_pattern and alpha_pattern replace r and
  lora_alpha for modules whose path ends in a key, taken as a regular expression; the first key that fits counts.
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
from ..config.fields import Fields, shown
from ..config.read import read_object
from ..errors import AdapterError, ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
PREFIX = "base_model.model."
_NAME = re.compile(r"(?P<path>.+)\.lora_(?P<half>[AB])(?:\.(?!weight$)[^.]+)?\.weight")

# What changes more than a product of two thin matrices, by the key that asks for it.
REFUSED = {
    "use_dora": "it is a DoRA adapter, which rescales the weights themselves",
    "modules_to_save": "it replaces whole modules",
    "lora_bias": "its matrices have biases",
    "use_qalora": "it is a QA-LoRA adapter, which pools the inputs",
    "target_parameters": "it adapts bare parameters, such as stacked experts",
    "trainable_token_indices": "it retrains single tokens of the embedding",
    "alora_invocation_tokens": "it is an activated LoRA, which begins in the middle of the prompt",
    "layer_replication": "it repeats layers of the model",
    "arrow_config": "it routes between adapters",
}
# These leave part of the original weights out of the model, so that the adapter alone belongs to another model.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
MERGE = "merge it into its base model with peft (merge_and_unload), then convert the result"


@dataclass(frozen=True, slots=True)
class Delta:
    """What one module gets added: scale * up @ down. down (rank, in_features), up (out_features, rank), as stored."""

    path: str
    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """digest: 16 bytes that stand for everything in the two files."""

    folder: Path
    deltas: tuple[Delta, ...]
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
    scaling = _Scaling(Fields(raw, str(folder / CONFIG)))
    path = folder / WEIGHTS
    infos = {info.name: info for info in read_header(path)}
    with Checkpoint(FolderIndex(folder, (path,), infos)) as tensors:
        found = [_delta(tensors, names, module, scaling) for module, names in _pairs(tensors).items()]
    return AdapterFiles(folder, tuple(found), _digest(folder))


class _Scaling:
    """Rank and scale of every module, as the configuration has them."""

    def __init__(self, fields: Fields) -> None:
        self.where = fields.where
        _refuse_kinds(fields)
        self.rank = fields.integer("r")
        self.alpha = fields.number("lora_alpha", above=-1e9)
        self.root = fields.flag("use_rslora", False)
        self.ranks = self._pattern(fields, "rank_pattern")
        self.alphas = self._pattern(fields, "alpha_pattern")

    def of(self, path: str, rank: int) -> float:
        """The scale of a module whose matrices have this rank. Raises AdapterError when the file says another."""
        wanted = _first(self.ranks, path, self.rank)
        if rank != wanted:
            raise AdapterError(
                f"{self.where}: module {short(path)} should have rank {wanted:g}, its tensors have {rank}",
                hint=f"{CONFIG} and {WEIGHTS} are from different adapters",
            )
        return _first(self.alphas, path, self.alpha) / (rank**0.5 if self.root else rank)

    def _pattern(self, fields: Fields, key: str) -> dict[re.Pattern[str], float]:
        given = fields.values.get(key) or {}
        if not isinstance(given, Mapping):
            raise fields.error(key, "an object")
        found = {}
        for text, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f'{self.where}: "{key}" of {short(text)} must be a number, is {shown(value)}')
            try:
                found[re.compile(rf"(.*\.)?({str(text).lstrip('^')})$")] = float(value)
            except re.error as err:
                raise ConfigError(f'{self.where}: "{key}": {short(text)} is no regular expression: {err}') from err
        return found


def _first(patterns: Mapping[re.Pattern[str], float], path: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if pattern.match(path)), default)


def _refuse_kinds(fields: Fields) -> None:
    kind = fields.values.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f"{fields.where}: the adapter is {shown(kind)}, only LORA is supported", hint=MERGE)
    for key, why in REFUSED.items():
        if fields.values.get(key):
            raise AdapterError(f'{fields.where}: "{key}" is set: {why}; that is not supported', hint=MERGE)
    if fields.values.get("bias", "none") != "none":
        bias = shown(fields.values["bias"])
        raise AdapterError(f'{fields.where}: "bias" is {bias}: retrained biases are not supported', hint=MERGE)
    start = fields.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise AdapterError(
            f"{fields.where}: the adapter was started by {start}, which changes the model's own weights too",
            hint="save it again with peft's path_initial_model_for_weight_conversion, which makes it an ordinary one",
        )


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


def _pairs(tensors: Checkpoint) -> dict[str, dict[str, str]]:
    """Module path -> half ("A", "B") -> tensor name, sorted by path."""
    pairs: dict[str, dict[str, str]] = {}
    for name in sorted(tensors.names):
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            what = "an adapted embedding" if "lora_embedding" in name else "neither of lora_A.weight and lora_B.weight"
            raise AdapterError(f"{tensors.where(name)} is {what}; that is not supported", hint=MERGE)
        halves = pairs.setdefault(match["path"], {})
        if other := halves.get(match["half"]):
            raise AdapterError(f"{tensors.where(name)} and {short(other)} are for the same module")
        halves[match["half"]] = name
    if not pairs:
        raise AdapterError(f"{tensors.folder / WEIGHTS}: holds no tensors", hint="download the file again")
    return pairs


def _delta(tensors: Checkpoint, names: Mapping[str, str], path: str, scaling: _Scaling) -> Delta:
    for half, other in (("A", "B"), ("B", "A")):
        if half not in names:
            raise AdapterError(f"{tensors.where(names[other])} has no lora_{half} beside it", hint="download it again")
    down, up = (tensors.tensor(names[half]) for half in ("A", "B"))
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise AdapterError(
            f"{tensors.where(names['A'])}: shape {tuple(down.shape)}, and {tuple(up.shape)} of lora_B: "
            "wanted (rank, in) and (out, rank)"
        )
    return Delta(path, down, up, scaling.of(path, down.shape[0]))


def _digest(folder: Path) -> bytes:
    total = blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 20):
                total.update(piece)
    return total.digest()
