"""Which text: a known one by name, or files. What is read is named, and hashed, in the protocol beside every number.

The known ones and where they come from: `corpora.py`. Their download: `download.py`.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from exl_runtime.console.progress import Progress
from exl_runtime.errors import DataError

NAMES = ("wikitext2", "c4")
BLANK_LINE = "\n\n"
_CHUNK = 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextData:
    """A text that can be read any number of times. Made by `chosen_data`; for tests: `from_files`.

    name          "wikitext2", "c4", or the names of the files
    paths         where it lies
    sha256        hex digest. wikitext2: of the raw text, however it is stored; c4: of the file; own files: of their
                  bytes one after another
    read          read(raw) gives the running text in pieces, each time from its start. raw: as the publisher's file
                  has it; else the rows of the data set, joined. For most data there is no difference.
    joined, raw   the two in words, for the protocol line
    most_windows  a limit that belongs to the data set as published; None: none
    """

    name: str
    paths: tuple[Path, ...]
    sha256: str
    read: Callable[[bool], Iterator[str]]
    joined: str
    raw: str
    most_windows: int | None = None

    def texts(self, *, raw: bool = False) -> Iterator[str]:
        """The running text in pieces, in bounded memory, see `read`.

        Raises DataError, from the iterator, for what turns out to be damaged.
        """
        return self.read(raw)

    def describe(self, *, raw: bool = False) -> str:
        """For the protocol line: name, hash, and how the text is put together."""
        return f"{self.name} (sha256 {self.sha256[:12]}), {self.raw if raw else self.joined}"


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data and --data-dir."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        nargs="+",
        default=["wikitext2"],
        metavar="NAME|FILE",
        help="wikitext2 (test split), c4 (a validation shard), or files: .txt, .jsonl, .json, .parquet "
        "(default: wikitext2)",
    )
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="look for wikitext2 and c4 here first, then in the Hugging Face cache; else they are downloaded",
    )


def chosen_data(args: argparse.Namespace, progress: Progress) -> TextData:
    """The text that the options of `add_data` in `args` name: found, downloaded if need be, and checked.

    Raises DataError: nowhere to be found, damaged, empty, no text; StorageError where a download cannot be written.
    """
    names = [text for text in args.data if text in NAMES]
    if not names:
        return from_files([Path(text).expanduser() for text in args.data])
    if len(args.data) > 1:
        raise DataError(
            f"--data {' '.join(args.data)}: {names[0]} stands alone",
            hint=f"for a file of that name give ./{names[0]}",
        )
    from .corpora import CORPORA, find

    return find(CORPORA[names[0]], args.data_dir, progress)


def from_files(paths: Sequence[Path]) -> TextData:
    """Own files as one text: their records and the files themselves are joined by blank lines.

    Raises DataError for a file that is missing, empty, compressed or none; the rest turns up while reading.
    """
    from exl_runtime.texts.documents import read_documents

    if not paths:
        raise DataError("no file with text given", hint="name a file with --data")
    for path in paths:
        read_documents(path)  # looks at the first bytes

    def running(raw: bool) -> Iterator[str]:
        for number, path in enumerate(paths):
            if number:
                yield BLANK_LINE
            yield from read_documents(path)

    how = "running text" if len(paths) == 1 else "files joined by blank lines"
    return TextData(
        name=", ".join(path.name for path in paths),
        paths=tuple(paths),
        sha256=digest(chain.from_iterable(file_bytes(path) for path in paths)),
        read=running,
        joined=how,
        raw=how,
    )


def file_bytes(path: Path) -> Iterator[bytes]:
    """The bytes of a file in pieces. Raises DataError."""
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror or err}", hint="check its permissions") from err


def digest(pieces: Iterable[bytes]) -> str:
    """SHA-256 in hex."""
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()
