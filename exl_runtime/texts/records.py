"""The texts inside files of records: JSON lines, JSON, parquet. One string per record, in the file's order.

A record is a text, or an object with one of `FIELDS`; a conversation becomes lines of "role: words".
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.fields import shown
from ..errors import DataError

FIELDS = ("text", "content", "messages")  # in search order
MAX_RECORD = 2**26  # bytes of a line, characters of a JSON record: what is held at once
_NAMED = 12  # keys or columns listed in a message


def json_lines(path: Path) -> Iterator[str]:
    """The texts of a file with one JSON record a line; blank lines are skipped. Raises DataError with the line."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_RECORD + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(line) > MAX_RECORD:
                raise DataError(f"{where}: longer than {MAX_RECORD} bytes", hint="split the record into several")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as err:
                offset = file.tell() - len(line) + err.start
                raise DataError(f"{where}: not UTF-8 text at byte {offset}: {err.reason}") from err
            except (ValueError, RecursionError) as err:
                raise _not_json(where, err, _list_hint(line)) from err
            yield record_text(record, where)


def json_texts(texts: Iterator[str], path: Path) -> Iterator[str]:
    """The texts of a JSON list of records, or of records one after another. Raises DataError with the record.

    texts   the file as text, in chunks of any size; only the record in hand is kept
    """
    window = _Window(texts, path)
    if window.peek() != "[":  # many a .json is JSON lines
        while window.peek():
            yield window.record()
        return
    window.skip()
    if window.peek() == "]":
        window.skip()
    else:
        while True:
            yield window.record()
            mark = window.peek()
            window.skip()
            if mark == "]":
                break
            if mark != ",":
                found = shown(mark) if mark else "the end of the file"
                raise DataError(f'{window.where}: "," or "]" must follow, found {found}')
    if window.peek():
        raise DataError(f"{path}: more text behind the end of the JSON list")


class _Window:
    """A text that arrives in chunks, read value by value."""

    def __init__(self, texts: Iterator[str], path: Path) -> None:
        self._texts = texts
        self._path = path
        self._buffer = ""
        self._at = 0
        self._count = 0
        self._decoder = json.JSONDecoder()

    @property
    def where(self) -> str:
        return f"{self._path}: record {self._count}"

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in " \t\r\n":
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                return ""

    def skip(self) -> None:
        self._at += 1

    def record(self) -> str:
        """The text of the next record."""
        self.peek()
        self._count += 1
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as err:
                # Cut off by the window's end, or broken: more text will tell.
                if len(self._buffer) - self._at > MAX_RECORD:
                    raise _not_json(self.where, err, f"no record may be longer than {MAX_RECORD} characters") from err
                if not self._more():
                    raise _not_json(self.where, err, None) from err
            else:
                return record_text(value, self.where)

    def _more(self) -> bool:
        """Drop what was read and at least double the rest, so that a long record is not parsed over and over."""
        parts = [self._buffer[self._at :]]
        wanted, got = max(1, len(parts[0])), 0
        while got < wanted and (text := next(self._texts, None)) is not None:
            parts.append(text)
            got += len(text)
        self._buffer, self._at = "".join(parts), 0
        return got > 0


def parquet_texts(path: Path) -> Iterator[str]:
    """The texts of a parquet file's rows; a row without a value has none. Raises DataError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as err:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from err
    number = 0
    try:
        # Buffered, or a whole column of a row group would be read at once.
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            columns = _text_columns(pyarrow, file.schema_arrow, path)
            for batch in file.iter_batches(batch_size=64, columns=columns, use_threads=False):
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    where = f"{path}: row {number}"
                    texts = [v if isinstance(v, str) else messages_text(v, where) for v in row if v is not None]
                    yield " ".join(texts)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as err:
        reason = " ".join(str(err).split())[:200]
        raise DataError(
            f"{path}: not a readable parquet file (after row {number}): {reason}", hint="download the file again"
        ) from err


def _text_columns(pyarrow: Any, schema: Any, path: Path) -> list[str]:
    types = pyarrow.types

    def is_text(kind: Any) -> bool:
        if types.is_dictionary(kind):
            kind = kind.value_type
        view = getattr(types, "is_string_view", lambda _: False)  # pyarrow 16 and later
        return types.is_string(kind) or types.is_large_string(kind) or view(kind)

    texts = [field.name for field in schema if is_text(field.type)]
    lists = [field.name for field in schema if types.is_list(field.type) or types.is_large_list(field.type)]
    for name in FIELDS:
        if name in (lists if name == "messages" else texts):
            return [name]
    if not texts:
        raise DataError(f"{path}: no column of text; columns seen: {_listed(schema.names)}")
    return texts


def record_text(record: object, where: str) -> str:
    """The text of one record as JSON gives it. Raises DataError that begins with `where`."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record is a text or an object, not {shown(record)}")
    for name in FIELDS:
        value = record.get(name)
        if value is None:
            continue
        if name == "messages":
            return messages_text(value, where)
        if not isinstance(value, str):
            raise DataError(f'{where}: "{name}" must be a text, is {shown(value)}')
        return value
    keys = [key if value is not None else f"{key} (null)" for key, value in record.items()]
    raise DataError(f'{where}: no "text", "content" or "messages"; keys seen: {_listed(keys)}')


def messages_text(messages: object, where: str) -> str:
    """A conversation as text: "role: words", a blank line between turns; turns without words are left out."""
    if not isinstance(messages, list):
        raise DataError(f'{where}: "messages" must be a list, is {shown(messages)}')
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{where}: a message is an object with "role" and "content", not {shown(message)}')
        content = message.get("content")
        if isinstance(content, list):  # parts: pictures beside texts
            content = "\n".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
        if content is not None and not isinstance(content, str):
            raise DataError(f'{where}: the "content" of a message must be a text, is {shown(content)}')
        if content:
            turns.append(f"{message['role']}: {content}")
    return "\n\n".join(turns)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(shown(name) for name in names[:_NAMED]) or "none") + more


def _list_hint(line: bytes) -> str | None:
    return "a list over several lines belongs into a .json file" if line.lstrip().startswith(b"[") else None


def _not_json(where: str, err: Exception, hint: str | None) -> DataError:
    if isinstance(err, RecursionError):
        reason = "nested too deeply"
    else:
        reason = err.msg if isinstance(err, json.JSONDecodeError) else str(err)
    return DataError(f"{where}: not valid JSON: {reason}", hint=hint)
