"""Conversations on disk: one JSON file each, versioned, written so that a crash leaves the old file or the new one.

Reads nothing on trust: every value is checked, and a damaged or foreign file is refused by name. Knows no runtime.
"""

import json
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..console.terminal import clean_line
from ..errors import SessionError
from .turn import ROLES, ReplyMeta, Turn

FORMAT = "exl-runtime chat"
VERSION = 1
MOST = 1 << 53  # no count of tokens or seconds comes near it
MAX_BYTES = 64 << 20  # far above any conversation; keeps a wrong path from filling the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What a file holds. `settings` are the reply settings as JSON values; `model` is a name, for people only."""

    turns: tuple[Turn, ...]
    system: str | None = None
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def write(path: Path, transcript: Transcript) -> None:
    """Write beside the target, flush, rename over it. Raises SessionError, also rather than replace a foreign file."""
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as err:  # a loop of links, a null byte
        raise SessionError(f"{clean_line(str(path))} is not a path to write to: {err}") from err
    try:
        foreign = path.exists() and not _is_ours(path)
    except OSError as err:  # a name too long, a folder of somebody else
        raise SessionError(f"cannot write {clean_line(str(path), 200)}: {err.strerror or err}") from err
    if foreign:
        raise SessionError(
            f"{clean_line(str(path))} exists and is not a saved chat", hint="choose another name, or remove the file"
        )
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": transcript.model,
        "system": transcript.system,
        "settings": dict(transcript.settings),
        "turns": [_turn_to_json(turn) for turn in transcript.turns],
    }
    data = (json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode("utf-8", "replace")
    try:
        _replace(path, data)
    except OSError as err:
        raise SessionError(f"cannot write {clean_line(str(path))}: {err.strerror or err}") from err


def read(path: Path) -> Transcript:
    """The conversation in `path`. Raises SessionError saying which part of the file is wrong."""
    name = clean_line(str(path))
    try:
        if path.is_dir() or not (size := path.stat().st_size) <= MAX_BYTES:
            raise SessionError(f"{name} is not a saved chat", hint="/save and /load take the path of one JSON file")
        text = path.read_bytes().decode("utf-8") if size else ""
    except OSError as err:
        raise SessionError(f"cannot read {name}: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise SessionError(f"{name} is not a saved chat: byte {err.start} is not UTF-8") from err
    except ValueError as err:  # a null byte inside the path
        raise SessionError(f"{name} is not a path: {err}") from err
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise SessionError(f"{name} is not valid JSON: {clean_line(str(err))}", hint="the file is damaged") from err
    try:
        return _transcript(document)
    except _Wrong as err:
        raise SessionError(f"{name} is not a saved chat this version can read: {err}") from err


class _Wrong(Exception):
    """A value in the document that must not be there, in words."""


def _transcript(document: object) -> Transcript:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _Wrong(f'it does not say "format": "{FORMAT}"')
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise _Wrong(f"its version is {clean_line(repr(version), 40)}, this program reads {VERSION}")
    system = document.get("system")
    settings = document.get("settings", {})
    turns = document.get("turns")
    if not isinstance(turns, list):
        raise _Wrong('"turns" is not a list')
    if not isinstance(settings, dict):
        raise _Wrong('"settings" is not an object')
    read_turns = tuple(_turn_from_json(turn, f"turn {index}") for index, turn in enumerate(turns))
    for index, turn in enumerate(read_turns):
        if turn.role != ROLES[index % 2]:
            raise _Wrong(f"turn {index} is by the {turn.role}, the {ROLES[index % 2]} was next")
    return Transcript(
        turns=read_turns,
        system=None if system is None else _text(system, '"system"'),
        model=_text(document.get("model", ""), '"model"'),
        settings=settings,
    )


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.meta is not None:
        entry["meta"] = asdict(turn.meta)
    return entry


def _turn_from_json(value: object, where: str) -> Turn:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is not an object")
    role = value.get("role")
    if role not in ROLES:
        raise _Wrong(f"{where} has the role {clean_line(repr(role), 40)}")
    content = _text(value.get("content"), f"the content of {where}")
    meta = value.get("meta")
    return Turn(role, content, None if meta is None else _meta(meta, f"the meta of {where}"))


def _meta(value: object, where: str) -> ReplyMeta:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is not an object")
    known = {entry.name: entry.type for entry in fields(ReplyMeta)}
    if unknown := sorted(set(value) - set(known)):
        raise _Wrong(f"{where} has the unknown entry {clean_line(repr(unknown[0]), 40)}")
    for name, kind in known.items():
        entry = value.get(name, 0 if name.startswith("dropped") else None)
        if kind is str:
            _text(entry, f"{name} in {where}")
        elif isinstance(entry, bool) or not isinstance(entry, int if kind is int else (int, float)):
            raise _Wrong(f"{name} in {where} is not a number")
        elif not 0 <= entry < MOST:  # NaN fails both
            raise _Wrong(f"{name} in {where} is out of range")
    return ReplyMeta(**value)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"{where} is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as err:
        raise _Wrong(f"{where} holds half a character") from err
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(256).strip()
    return not start or (start.startswith(b"{") and f'"{FORMAT}"'.encode() in start)


def _replace(path: Path, data: bytes) -> None:
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600  # conversations are private
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)
