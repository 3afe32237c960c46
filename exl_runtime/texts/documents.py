"""Text out of files, as running text: plain text, JSON lines, a JSON list, parquet.

Everything streams: a file of any size is read in bounded memory. Knows no tokens.
"""

import codecs
import io
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..config.fields import shown
from ..errors import DataError
from .records import json_lines, json_texts, parquet_texts

PIECE = 2**16  # characters of one piece of plain text
_CHUNK = 2**18  # bytes read at once
_BLANK_LINE = "\n\n"

_COMPRESSED = {
    ".gz": b"\x1f\x8b",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".xz": b"\xfd7zXZ",
    ".bz2": b"BZh91AY&SY",
    ".zip": b"PK\x03\x04",
    ".7z": b"7z\xbc\xaf\x27\x1c",
}
_LFS = b"version https://git-lfs"


def read_documents(path: Path) -> Iterator[str]:
    """The running text of one file, in order: `"".join(read_documents(path))` is all of it.

    .jsonl      a record a line (also .jsonlines, .ndjson). A record is a text, or an object with "text", "content" or
                "messages".
    .json       a list of such records, or records one after another
    .parquet    a record a row: the column text, else content, else messages, else every text column, joined by spaces
                as exllamav2 does. Needs pyarrow.
    any other   UTF-8 text with or without a byte order mark, in pieces of about `PIECE` characters that end where a
                paragraph or line ends; line ends become "\\n", as everywhere in Python

    Records are yielded one string each; all but the last end in a blank line.

    Raises DataError, with the place in the file: at once for a file that is missing, empty, compressed, a pointer
    of Git LFS or no file at all, and from the iterator for what turns up on the way.
    """
    path = Path(path)
    _require_text_file(path)
    ending = path.suffix.lower()
    if ending in (".jsonl", ".jsonlines", ".ndjson"):
        texts = _with_blank_lines(json_lines(path))
    elif ending == ".json":
        texts = _with_blank_lines(json_texts(_decoded(path), path))
    elif ending == ".parquet":
        texts = _with_blank_lines(parquet_texts(path))
    else:
        texts = regroup(_unix_line_ends(_decoded(path)), PIECE)
    return _checked(texts, path)


def regroup(texts: Iterable[str], size: int) -> Iterator[str]:
    """The same running text in pieces of size/2 to `size` characters, the last one shorter.

    A piece ends behind a blank line where there is one in its second half, else behind a line, else before a space
    (a space belongs to the word behind it, for a tokenizer), else anywhere. Line ends that follow stay with it.
    """
    parts: list[str] = []
    held = 0
    for text in texts:
        parts.append(text)
        held += len(text)
        if held <= size:
            continue
        buffer, start = "".join(parts), 0
        while len(buffer) - start > size:
            end = _end_of_piece(buffer, start, size)
            yield buffer[start:end]
            start = end
        parts, held = [buffer[start:]], len(buffer) - start
    if held:
        yield "".join(parts)


def _end_of_piece(text: str, start: int, size: int) -> int:
    low, high = start + max(1, size // 2), start + size
    for mark in (_BLANK_LINE, "\n"):
        at = text.rfind(mark, low, high)
        if at >= 0:
            end = at + len(mark)
            while end < len(text) and text[end] == "\n":
                end += 1
            return end
    at = text.rfind(" ", low, high)
    return at if at >= 0 else high


def _require_text_file(path: Path) -> None:
    """Everything that can be said without reading more than the first bytes."""
    try:
        status = path.stat()
        # A pipe or device would block or never end.
        if not stat.S_ISREG(status.st_mode):
            folder = stat.S_ISDIR(status.st_mode)
            raise DataError(
                f"{path}: {'a folder' if folder else 'not a regular file'}; a file of text is wanted",
                hint="name the files in it" if folder else "write it to a file first",
            )
        with open(path, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        gone = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise DataError(f"{path}: {gone}", hint="check the path") from None
    except OSError as err:
        raise _unreadable(path, err) from err
    except ValueError as err:  # a null byte inside the path
        raise DataError(f"{shown(str(path))}: not a path: {err}") from err
    if not head:
        raise DataError(f"{path}: the file is empty", hint="give a file with text in it")
    if head.startswith(_LFS):
        raise DataError(f"{path}: a Git LFS pointer, not the file itself", hint="run `git lfs pull` where it came from")
    for ending, magic in _COMPRESSED.items():
        if path.suffix.lower() == ending or head.startswith(magic):
            raise DataError(f"{path}: compressed ({ending[1:]}); only plain files are read", hint="unpack it first")


def _decoded(path: Path) -> Iterator[str]:
    """The file as text, a byte order mark left out. Raises DataError with the offset of the first bad byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    with open(path, "rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            held = decoder.getstate()[0]
            # UTF-16 without a mark and most binary files: valid UTF-8 for long stretches, but no text has zeros.
            zero = chunk.find(0)
            try:
                text = decoder.decode(chunk[:zero] if zero >= 0 else chunk, final=not chunk)
            except UnicodeDecodeError as err:
                raise _not_text(path, start - len(held) + err.start, err.reason) from err
            if zero >= 0:
                raise _not_text(path, start + zero, "a zero byte")
            yield text if start else text.removeprefix("\ufeff")
            if not chunk:
                return
            start += len(chunk)


def _not_text(path: Path, offset: int, reason: str) -> DataError:
    with open(path, "rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return DataError(
        f"{path}: not UTF-8 text at byte {offset}: {reason}",
        hint="it begins like UTF-16: save it as UTF-8" if wide else "save it as UTF-8, or leave this file out",
    )


def _unix_line_ends(texts: Iterable[str]) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for text in texts:
        yield decoder.decode(text)
    yield decoder.decode("", final=True)


def _with_blank_lines(texts: Iterable[str]) -> Iterator[str]:
    last = None
    for text in texts:
        if not text:
            continue
        if last is not None:
            yield last + _BLANK_LINE
        last = text
    if last is not None:
        yield last


def _checked(texts: Iterator[str], path: Path) -> Iterator[str]:
    found = False
    try:
        for text in texts:
            found = found or not text.isspace()
            yield text
    except OSError as err:
        raise _unreadable(path, err) from err
    if not found:
        raise DataError(f"{path}: holds no text", hint="give a file with text in it")


def _unreadable(path: Path, err: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {err.strerror or err}", hint="check its permissions")
