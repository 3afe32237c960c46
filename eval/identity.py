"""What makes two references the same, and two models comparable.

The key of a reference is a hash of the weight files (name, size, header; the content of files up to 64 MiB, of larger
ones 64 samples and the time of the last change), of all *.json of the folder and tokenizer.model, of the ids of the
windows, of the precision, device and backend, and of the version of this program. So an edited weight, another
tokenizer or another text make a new one; and so does a large source that was copied, as its files get a new time.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exl_runtime.errors import EvalError, StorageError

from .protocol import Window

if TYPE_CHECKING:
    from exl_runtime.tokenizer.tokenizer import Tokenizer

_WHOLE = 64 * 2**20  # bytes of a weight file up to which all of it is hashed
_SAMPLES, _SAMPLE = 64, 4096
_PROBES = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.\n\n",
    "  def f(x):\n\treturn x ** 2  # naïve café, 東京, Привет, 🙂\r\n",
    "http://example.com/?q=a&b=[c]{d}<e> don't I'LL ... --- \u00a0 \u0301",
)


@dataclass(frozen=True)
class Source:
    """What is known of a model without its weights."""

    name: str
    folder: Path
    vocab: int
    tokenizer: "Tokenizer"

    @classmethod
    def find(cls, model: str | Path) -> "Source":
        from exl_runtime.config.read import load_config
        from exl_runtime.config.resolve import resolve
        from exl_runtime.runtime.load import DEMO_FOLDER, find
        from exl_runtime.tokenizer.tokenizer import Tokenizer

        folder = find(model)
        files = load_config(folder)
        vocab = resolve(files.config, files.generation).vocab_size
        return cls("demo" if folder == DEMO_FOLDER else folder.name, folder, vocab, Tokenizer.open(folder))


@dataclass(frozen=True)
class Survey:
    """Of all windows: scored tokens of each, the most tokens of one, and a hash of their ids."""

    counts: tuple[int, ...]
    longest: int
    digest: str

    @classmethod
    def of(cls, windows: Iterable[Window]) -> "Survey":
        state = hashlib.sha256()
        counts, longest = [], 0
        for window in windows:
            state.update(json.dumps([window.first, *window.ids]).encode("ascii"))
            counts.append(len(window.ids) - window.first)
            longest = max(longest, len(window.ids))
        if not counts:
            raise EvalError("no window to score", hint="give a text with more tokens")
        return cls(tuple(counts), longest, state.hexdigest())


def key_of(source: Source, survey: Survey, dtype: str, kernels: Sequence[str]) -> str:
    """32 hex digits, see the top of this file. Raises CheckpointError, or StorageError for a file it cannot read."""
    from exl_runtime import __version__
    from exl_runtime.checkpoint.index import read_folder

    folder = source.folder
    small = sorted(path for path in folder.iterdir() if path.suffix == ".json" or path.name == "tokenizer.model")
    try:
        identity = {
            "version": __version__,
            "dtype": dtype,
            "kernels": list(kernels),
            "windows": survey.digest,
            "weights": [_weights_identity(path) for path in read_folder(folder).files],
            "files": [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in small],
        }
    except OSError as err:
        raise StorageError(
            f"{err.filename or folder}: cannot be read: {err.strerror or err}", hint="check its permissions"
        ) from err
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _weights_identity(path: Path) -> list[object]:
    state = hashlib.sha256()
    with open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        if facts.st_size <= _WHOLE:
            while chunk := file.read(2**20):
                state.update(chunk)
            return [path.name, facts.st_size, state.hexdigest()]
        header = int.from_bytes(file.read(8), "little")
        state.update(file.read(min(header, _WHOLE)))
        for i in range(_SAMPLES):
            file.seek((facts.st_size - _SAMPLE) * i // (_SAMPLES - 1))
            state.update(file.read(_SAMPLE))
    return [path.name, facts.st_size, state.hexdigest(), facts.st_mtime_ns]


def difference(a: "Tokenizer", b: "Tokenizer") -> str | None:
    """How two tokenizers differ, in a few words."""
    from exl_runtime.tokenizer.same import first_difference

    if a.vocab_size != b.vocab_size:
        return f"their tokenizers have {a.vocab_size} and {b.vocab_size} tokens"
    if (found := first_difference(a, b)) is not None:
        index, first, second = found
        return f"token {index} is {first!r} in one and {second!r} in the other"
    if any(a.encode(text, add_bos=None) != b.encode(text, add_bos=None) for text in _PROBES):
        return "their tokenizers cut the same text into different tokens"
    return None
