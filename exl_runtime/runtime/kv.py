"""Keys and values of a conversation between two starts: what a runtime can say of its cache, and take back.

Knows the generator and snapshots; writes no file.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..cache.snapshot import Identity, Snapshot, pieces, snapshot_bytes
from ..errors import StorageError
from ..generation.generator import Generator

SAMPLES = 64  # places of each weight file that are read,
SAMPLE = 4096  # with so many bytes: a fine-tuned model has the same sizes and names


@dataclass(frozen=True, slots=True)
class HeldKV:
    """What the cache holds of a conversation: `tokens` tokens, about `nbytes` bytes as a file, the bytes of it."""

    tokens: int
    nbytes: int
    pieces: Iterator[bytes | memoryview]


class KVKeeper:
    """The snapshots of one runtime. `folder` is the model's, `computed` says how it computes."""

    def __init__(self, folder: Path, computed: str) -> None:
        self._folder = folder
        self._computed = computed
        self._model: str | None = None
        self._open: dict[Path, Snapshot] = {}

    @contextmanager
    def holding(
        self, generator: Generator, tokens: Sequence[int], *, past: bytes = b"", keep: int | None = None
    ) -> Iterator[HeldKV]:
        """What is in the cache of `tokens`, see `Generator.holding`; valid within the block."""
        with generator.holding(tokens, past=past, keep=keep) as held:
            geometry = generator.kv.geometry
            count = len(held.tokens)
            parts = pieces(generator.kv, held, self._identity(generator))
            yield HeldKV(count, snapshot_bytes(geometry, count, held.missing) if count else 0, parts)

    def open(self, generator: Generator, path: Path) -> int:
        """Serve prompts from the snapshot in `path`; the tokens it holds. Raises StorageError: it does not fit."""
        snapshot = Snapshot.open(path, self._identity(generator), generator.kv.geometry)
        self.drop(generator, path)
        try:
            generator.attach(snapshot)
        except StorageError:
            snapshot.close()
            raise
        self._open[path.absolute()] = snapshot
        return snapshot.held

    def drop(self, generator: Generator, path: Path) -> None:
        """Serve no more from it."""
        snapshot = self._open.pop(path.absolute(), None)
        if snapshot is not None:
            generator.detach(snapshot)
            snapshot.close()

    def close(self) -> None:
        """Let go of all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _identity(self, generator: Generator) -> Identity:
        if self._model is None:
            self._model = model_identity(self._folder)
        return Identity.of(self._model, self._computed, generator.kv.geometry)


def model_identity(folder: Path) -> str:
    """A hash of config.json and, for each weight file, its name, size, header and samples of its content: cheap, and
    another model gives another. Raises StorageError."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update((folder / "config.json").read_bytes())
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                size = path.stat().st_size
                head = file.read(8)
                header = file.read(min(int.from_bytes(head, "little"), size))
                digest.update(f"{path.name} {size} {len(header)}\n".encode() + header)
                start = len(head) + len(header)
                for number in range(SAMPLES):
                    file.seek(start + max(0, size - start - SAMPLE) * number // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE))
    except OSError as err:
        raise StorageError(f"{folder.name}: the model's files cannot be read any more: {err.strerror or err}") from err
    return digest.hexdigest()
