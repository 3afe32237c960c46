"""Divergences that were measured before and saved: by `eval compare`, by `eval cache`, by a conversion.

Knows where the numbers stand in those files, and which model folder they are about; judges nothing.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from exl_runtime.errors import DataError

FORMAT = "exl-runtime comparison"  # of the facts of `compare` and `cache`, and of the data inside their HTML pages
VERSION = 1
FACTS_ID = "facts"  # of the element of a page that holds them
REPORT_FORMAT = "exl-runtime conversion report"  # report.json in a converted folder
LARGEST = 64 << 20
HINT = "give the output of `eval compare --json` or `eval cache --json`, or the page that -o wrote"
Json = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRow:
    """KL(reference || this), mean per token in nats, of one folder with one type of cache."""

    path: str
    name: str
    cache: str
    kl: float
    file_bytes: int | None = None  # of the folder's tensors when it was measured


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSet:
    """Rows that compare with each other: one text, one protocol, one reference.

    origin  the file they are from
    label   what was measured, for people
    own     every row against the same model with the fp32 cache: what a cache type costs, nothing else
    """

    origin: str
    label: str
    own: bool
    rows: tuple[SavedRow, ...]

    def of(self, folder: Path, file_bytes: int) -> dict[str, float]:
        """Cache type -> KL of the model in `folder`; by its path, or by its name where the path is not in the set.

        Rows whose folder held tensors of another size are of another model and do not count.
        """
        at = str(folder.resolve())
        here = [row for row in self.rows if row.path == at]
        here = here or [row for row in self.rows if row.name == folder.resolve().name]
        return {row.cache: row.kl for row in here if row.file_bytes in (None, file_bytes)}


def read_measurements(path: Path) -> SavedSet:
    """The rows of a file that `eval compare` or `eval cache` made. Raises DataError."""
    text = _text(path)
    facts = _from_page(text) if path.suffix.lower() in (".html", ".htm") else _from_lines(text)
    if facts is None:
        raise DataError(f"{path}: holds no comparison of models", hint=HINT)
    if facts.get("version") != VERSION:
        raise DataError(f"{path}: a comparison of version {facts.get('version')!r:.40}, not {VERSION}", hint=HINT)
    rows = facts.get("rows")
    found = [_row(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    kept = tuple(row for row in found if row is not None)
    if not kept:
        raise DataError(
            f"{path}: holds no complete divergences, only sizes, perplexities or partial ones",
            hint="measure again with --reference SOURCE, the unquantized model",
        )
    against, protocol = facts.get("reference"), facts.get("protocol")
    own = facts.get("command") == "cache" and against is None
    label = f"{protocol}, against {'the same model with the fp32 cache' if own else against}"
    return SavedSet(origin=str(path), label=label, own=own, rows=kept)


def read_reports(folder: Path) -> tuple[SavedSet, ...]:
    """What the conversion that made `folder` measured, one set per text.

    () where it left no readable report, or one about weight files of another size.
    """
    path = folder / "report.json"
    try:
        value = json.loads(_text(path))
    except (DataError, ValueError, RecursionError):
        return ()
    if not isinstance(value, dict) or value.get("format") != REPORT_FORMAT or value.get("version") != 1:
        return ()
    if value.get("bytes") != sum(file.stat().st_size for file in folder.glob("*.safetensors")):
        return ()
    sets = []
    entries, source = value.get("divergence"), Path(str(value.get("source"))).name
    for entry in entries if isinstance(entries, list) else []:
        kl = _number(entry.get("kl_mean")) if isinstance(entry, dict) else None
        if kl is None:
            continue
        # The judge of a conversion keeps keys and values as they are: fp32.
        row = SavedRow(path=str(folder.resolve()), name=folder.resolve().name, cache="fp32", kl=kl)
        label = f"{entry.get('text')}, {entry.get('tokens')} tokens, against {source}"
        sets.append(SavedSet(origin=str(path), label=f"conversion report: {label}", own=False, rows=(row,)))
    return tuple(sets)


def merged(sets: Iterable[SavedSet]) -> tuple[SavedSet, ...]:
    """Sets of the same label as one: rows of several files compare when they were measured alike."""
    by_label: dict[tuple[str, bool], list[SavedSet]] = {}
    for one in sets:
        by_label.setdefault((one.label, one.own), []).append(one)
    return tuple(
        SavedSet(
            origin=_several(list(dict.fromkeys(one.origin for one in group))),
            label=label,
            own=own,
            rows=tuple(row for one in group for row in one.rows),
        )
        for (label, own), group in by_label.items()
    )


def _several(origins: list[str]) -> str:
    return origins[0] if len(origins) == 1 else f"{origins[0]} and {len(origins) - 1} more"


def _row(row: Json) -> SavedRow | None:
    kl, path, name, cache = _number(row.get("kl_mean")), row.get("path"), row.get("name"), row.get("cache")
    if (
        kl is None
        or row.get("partial")
        or not (isinstance(path, str) and isinstance(name, str) and isinstance(cache, str))
    ):
        return None
    size = row.get("file_bytes")
    return SavedRow(path=path, name=name, cache=cache, kl=kl, file_bytes=size if isinstance(size, int) else None)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path}: larger than {LARGEST >> 20} MiB: not a comparison of models", hint=HINT)
        return path.read_text(encoding="utf-8")
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror or err}", hint=HINT) from err
    except ValueError as err:
        raise DataError(f"{path}: not UTF-8 text", hint=HINT) from err


def _from_lines(text: str) -> Json | None:
    """The last comparison among JSON lines, or the whole text as one object."""
    candidates = [text, *reversed(text.splitlines())]
    for candidate in candidates:
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and value.get("format") == FORMAT:
            return value
    return None


def _from_page(text: str) -> Json | None:
    reader = _FactsReader()
    reader.feed(text)
    reader.close()
    return _from_lines("".join(reader.parts))


class _FactsReader(HTMLParser):
    """The text of the element that holds the facts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if ("id", FACTS_ID) in attrs:
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.parts.append(data)
