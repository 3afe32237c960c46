"""Read the JSON files that describe a model folder. Knows no key but `quantization_config`.

Every way in which a file can be broken ends in one ConfigError that names it.
"""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .fields import shown

MAX_BYTES = 64 * 2**20  # real files are a few kilobytes; more is not a configuration
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")  # formats/gptq.md 5, in search order
AGAIN = "download the file again"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFiles:
    """What a model folder says about itself.

    config        config.json
    generation    generation_config.json, {} when there is none
    quantization  how the weights were quantized: quantize_config.json before quant_config.json before
                  config.json["quantization_config"], key by key; {} when no file says anything
    """

    folder: Path
    config: dict[str, object]
    generation: dict[str, object]
    quantization: dict[str, object]


def load_config(folder: Path | str) -> ConfigFiles:
    """Read the JSON files of a model folder. Raises ConfigError."""
    folder = Path(folder)
    _require_folder(folder)
    config = read_object(folder / "config.json")
    if config is None:
        raise ConfigError(f"{folder}: no config.json in this folder", hint=_missing_hint(folder))
    quantization: dict[str, object] = {}
    inner = config.get("quantization_config")
    if inner is not None:
        if not isinstance(inner, dict):
            raise ConfigError(
                f'{folder / "config.json"}: "quantization_config" must be an object, is {shown(inner)}', hint=AGAIN
            )
        quantization.update(inner)
    for name in reversed(QUANTIZATION_FILES):
        quantization.update(read_object(folder / name) or {})
    generation = read_object(folder / "generation_config.json") or {}
    return ConfigFiles(folder=folder, config=config, generation=generation, quantization=quantization)


def read_object(path: Path) -> dict[str, object] | None:
    """The JSON object in a file; None when there is no such file. Raises ConfigError for anything else."""
    try:
        return _parse(path, _bytes(path))
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(f"{path}: a link to a file that does not exist", hint=AGAIN) from None
        return None
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror or err}", hint="check its permissions") from err


def _require_folder(folder: Path) -> None:
    try:
        mode = folder.stat().st_mode
        if not stat.S_ISDIR(mode):
            raise ConfigError(f"{folder}: a file, not a folder", hint="give the folder that holds config.json")
        next(folder.iterdir(), None)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: no such folder", hint="check the path of the model") from None
    except OSError as err:
        raise ConfigError(f"{folder}: cannot be read: {err.strerror or err}", hint="check its permissions") from err
    except ValueError as err:  # a null byte inside the path
        raise ConfigError(f"{shown(str(folder))}: not a path: {err}") from err


def _missing_hint(folder: Path) -> str:
    if any(folder.glob("*.gguf")):
        return "this is a GGUF model; the folder of its EXL2, GPTQ or safetensors version is needed"
    if any(folder.glob("*.safetensors")):
        return "download config.json of the same model into it"
    inside = sorted(child.name for child in folder.iterdir() if os.path.isfile(child / "config.json"))
    return f"did you mean the folder {folder / inside[0]}?" if inside else "give the folder that holds config.json"


def _bytes(path: Path) -> bytes:
    status = path.stat()
    # A pipe or device would block or never end; a folder has no bytes.
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: not a regular file", hint=AGAIN)
    if status.st_size > MAX_BYTES:
        raise ConfigError(f"{path}: {status.st_size} bytes, more than {MAX_BYTES}: not a configuration", hint=AGAIN)
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _parse(path: Path, data: bytes) -> dict[str, object]:
    if not data.strip():
        raise ConfigError(f"{path}: the file is empty", hint=AGAIN)
    if data.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path}: a Git LFS pointer, not the file itself", hint="run `git lfs pull` in the folder")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 text (byte {err.start})", hint=AGAIN) from err
    except json.JSONDecodeError as err:
        raise ConfigError(f"{path}: not valid JSON: {err.msg}, line {err.lineno}", hint=AGAIN) from err
    except RecursionError as err:
        raise ConfigError(f"{path}: JSON nested too deeply", hint=AGAIN) from err
    except ValueError as err:  # _unique, _no_constant, or a number with thousands of digits
        raise ConfigError(f"{path}: not valid JSON: {err}", hint=AGAIN) from err
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object, holds {shown(value)}", hint=AGAIN)
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose keys do not contradict each other."""
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result and result[key] != value:
            raise ValueError(f"key {shown(key)} appears twice with different values")
        result[key] = value
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
