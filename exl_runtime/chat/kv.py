"""The keys and values of a conversation, kept beside its file: opened again, it costs no time to read it.

TALK.json.kv is a snapshot (`exl_runtime.cache.snapshot`) of the present branch: about as many bytes as the tokens take
in the cache, which is much more than the text. It is written when asked for, whole or not at all, and goes when its
conversation goes or when something of it is deleted. One that does not fit is refused and the text computed as usual.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..console.terminal import clean_line
from ..errors import ExlError, SessionError, UsageError
from . import history

if TYPE_CHECKING:
    from ..runtime import Runtime

SUFFIX = ".kv"
Messages = Sequence[dict[str, str]]
Asked: TypeAlias = "tuple[Runtime, Messages, bytes, Mapping[str, Any]]"


def kv_path(path: Path) -> Path:
    """Where the keys and values of the conversation in `path` lie."""
    return path.with_name(path.name + SUFFIX)


def remove_kv(path: Path) -> int:
    """Delete the snapshot of the conversation in `path`; the bytes freed. Raises SessionError."""
    there = kv_path(path)
    try:
        size = there.stat().st_size
        there.unlink()
    except FileNotFoundError:
        return 0
    except OSError as err:
        raise SessionError(f"cannot remove {clean_line(str(there))}: {err.strerror or err}") from err
    return size


@dataclass(frozen=True, slots=True)
class KVSize:
    """Tokens, and bytes of the file: as written, or about so many before that."""

    tokens: int
    nbytes: int


class KVBeside:
    """The snapshot of one session. `auto`: write it when the kept conversation is closed.

    `due`: a reply was made since. `problem` is why a snapshot could not be used, until somebody has read it out.
    """

    def __init__(self, ask: "Callable[[], Asked]") -> None:
        """`ask`: the present model, the messages it sees, the digest of those before them (`tokenizer.past`), and the
        variables of its template."""
        self._ask = ask
        self.auto = False
        self.due = False
        self.loaded = 0  # tokens of the snapshot that was opened
        self.problem: ExlError | None = None

    def size(self) -> KVSize:
        """What `save` would write now. Raises UsageError: nothing is in the cache."""
        runtime, messages, past, args = self._asked()
        with runtime.held_kv(messages, past=past, template_args=args) as held:
            _require(held.tokens)
            return KVSize(held.tokens, held.nbytes)

    def save(self, path: Path) -> KVSize:
        """Write what the cache holds of this conversation beside `path`. Raises SessionError, UsageError."""
        runtime, messages, past, args = self._asked()
        with runtime.held_kv(messages, past=past, template_args=args) as held:
            _require(held.tokens)
            there = kv_path(path)
            try:
                free = shutil.disk_usage(there.absolute().parent).free
            except OSError as err:
                raise SessionError(f"cannot write {clean_line(str(there))}: {err.strerror or err}") from err
            if free < held.nbytes:
                raise SessionError(
                    f"keys and values need {held.nbytes >> 20} MiB, the disk has {free >> 20} MiB free",
                    hint="free some space; a smaller cache type (--cache q8) makes smaller snapshots",
                )
            history.write_private_pieces(there, held.pieces)
            tokens = held.tokens
        self.due = False
        return KVSize(tokens, there.stat().st_size)

    def open(self, path: Path) -> int:
        """Use what lies beside `path`; the tokens in it, 0 when there is nothing. Raises StorageError: it does not
        fit."""
        self.loaded = self._ask()[0].open_kv(kv_path(path)) if kv_path(path).is_file() else 0
        return self.loaded

    def try_open(self, path: Path) -> None:
        """Like `open`; what is wrong becomes `problem`."""
        try:
            self.open(path)
        except ExlError as err:
            self.problem = err

    def drop(self, path: Path) -> int:
        """Remove what lies beside `path`; the bytes freed. Raises SessionError."""
        self._ask()[0].drop_kv(kv_path(path))
        self.loaded = 0
        return remove_kv(path)

    def told(self) -> ExlError | None:
        """`problem`, once."""
        problem, self.problem = self.problem, None
        return problem

    def _asked(self) -> "Asked":
        asked = self._ask()
        if not any(message["role"] != "system" for message in asked[1]):
            raise UsageError("nothing was said yet")
        return asked


def _require(tokens: int) -> None:
    if not tokens:
        raise UsageError("nothing of this conversation is in the cache", hint="say something first, then save it")
