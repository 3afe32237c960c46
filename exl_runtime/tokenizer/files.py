"""Reading the small files beside the weights: JSON and text, with every way they break turned into one clear error.

Knows nothing of tokenizers or templates; the caller names the error class that fits its room.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import ExlError, TokenizerError

MAX_BYTES = 256 * 2**20  # the largest public tokenizer.json is below 40 MiB
_LFS = "version https://git-lfs"


def exists(path: Path) -> bool:
    """Whether `path` is there; what cannot be looked at counts as absent, a link that leads nowhere as there.

    Download caches are full of links: a broken one is a file that is missing, and not one that never existed.
    """
    return os.path.lexists(path)


def read_text(path: Path, error: type[ExlError] = TokenizerError, *, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text of `path`. Raises `error` naming the file when it cannot be read, is empty or too large."""
    try:
        status = path.stat()
        # A pipe or device would block or never end.
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise error(f"{path} is {kind}; a text file is wanted", hint="download the file again")
        if status.st_size > limit:
            raise error(f"{path} has {status.st_size} bytes; more than {limit} is not plausible for such a file")
        with open(path, "rb") as file:
            text = file.read(limit + 1).decode("utf-8-sig")
    except FileNotFoundError as err:
        if path.is_symlink():
            raise error(f"{path} is a link to a file that does not exist", hint="download the file again") from err
        raise error(f"{path} does not exist", hint="download the complete model folder") from err
    except UnicodeDecodeError as err:
        raise error(f"{path} is not UTF-8 text: {err.reason} at byte {err.start}") from err
    except OSError as err:
        raise error(f"{path} cannot be read: {err.strerror or err}", hint="check the file's permissions") from err
    except ValueError as err:  # a null byte inside the path
        raise error(f"{str(path)!r} is not a path: {err}") from err
    if not text.strip():
        raise error(f"{path} is empty", hint="download the file again")
    if text.startswith(_LFS):
        raise error(f"{path} is a Git LFS pointer, not the file itself", hint="run `git lfs pull` in the model folder")
    return text


def read_json(path: Path, error: type[ExlError] = TokenizerError) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error` naming the file when it is not one."""
    text = read_text(path, error)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        reason = "nested too deeply" if isinstance(err, RecursionError) else str(err)
        raise error(f"{path} is not valid JSON: {reason}", hint="download the file again") from err
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_optional_json(path: Path, error: type[ExlError] = TokenizerError) -> dict[str, Any]:
    """Like `read_json`, but an absent file reads as an empty object."""
    return read_json(path, error) if exists(path) else {}
