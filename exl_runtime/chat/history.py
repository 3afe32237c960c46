"""Conversations on disk: one JSON file each, versioned, written so that a crash leaves the old file or the new one.

Version 2 holds all branches; version 1 held one list of turns and is read as a conversation of one branch.
Reads nothing on trust: every value is checked, and a damaged or foreign file is refused by name. Knows no runtime.
"""

import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..console.terminal import clean_line
from ..errors import SessionError
from . import checks
from .checks import Wrong
from .steps import Add, Go, Name, Settings, Step, System
from .tree import START, Node, Tree
from .turn import Turn

FORMAT = "exl-runtime chat"
VERSION = 2
READABLE = (1, VERSION)
MAX_BYTES = 64 << 20  # far above any conversation; keeps a wrong path from filling the memory


@dataclass(slots=True, kw_only=True)
class Transcript:
    """What a file holds. `settings` are the reply settings as JSON values; `model` is a name, for people only.

    `key` names the conversation and `revision` counts its files: a journal belongs to one of them.
    """

    tree: Tree = field(default_factory=Tree)
    system: str | None = None
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    revision: int = 0

    @classmethod
    def of(cls, turns: Iterable[Turn], **rest: Any) -> "Transcript":
        """A conversation of one branch. Raises Wrong when two turns of the same side follow each other."""
        transcript = cls(**rest)
        for number, turn in enumerate(turns):
            transcript.tree.take(Add(number + 1, number, turn.role, turn.content, turn.meta))
        return transcript

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The messages up to where the conversation stands."""
        return tuple(node.turn for node in self.tree.path())

    def take(self, step: Step) -> None:
        """Let `step` happen. Raises Wrong if it cannot."""
        if isinstance(step, System):
            self.system = step.text
        elif isinstance(step, Settings):
            self.settings = step.values
        else:
            self.tree.take(step)


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
    tree = transcript.tree
    document = {
        "format": FORMAT,
        "version": VERSION,
        "key": transcript.key,
        "revision": transcript.revision,
        "model": transcript.model,
        "system": transcript.system,
        "settings": dict(transcript.settings),
        "current": tree.current,
        "names": tree.names,
        "messages": [_node_to_json(node) for node in tree.nodes.values()],
    }
    data = (json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode("utf-8", "replace")
    write_private(path, data)


def read(path: Path) -> Transcript:
    """The conversation in `path` alone, without its journal. Raises SessionError saying what of the file is wrong."""
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
        document = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as err:
        raise SessionError(f"{name} is not valid JSON: {clean_line(str(err))}", hint="the file is damaged") from err
    try:
        return _transcript(document)
    except Wrong as err:
        raise SessionError(f"{name} is not a saved chat this version can read: {err}") from err


def _transcript(document: object) -> Transcript:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Wrong(f'it does not say "format": "{FORMAT}"')
    version = document.get("version")
    if type(version) is not int or version not in READABLE:
        raise Wrong(f"its version is {clean_line(repr(version), 40)}, this program reads 1 to {VERSION}")
    system = document.get("system")
    common: dict[str, Any] = {
        "system": None if system is None else checks.text(system, '"system"'),
        "model": checks.text(document.get("model", ""), '"model"'),
        "settings": checks.mapping(document.get("settings", {}), '"settings"'),
    }
    if version == 1:
        turns = _list(document, "turns")
        return Transcript.of((_turn(turn, f"turn {index}") for index, turn in enumerate(turns)), **common)
    transcript = Transcript(
        **common,
        key=checks.text(document.get("key", ""), '"key"'),
        revision=checks.whole(document.get("revision", 0), '"revision"'),
    )
    for index, entry in enumerate(_list(document, "messages")):
        transcript.tree.take(_add(entry, f"message {index}"))
    for name, at in checks.mapping(document.get("names", {}), '"names"').items():
        transcript.tree.take(Name(checks.whole(at, '"names"'), checks.text(name, '"names"')))
    transcript.tree.take(Go(checks.whole(document.get("current", START), '"current"')))
    return transcript


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    value = document.get(name)
    if not isinstance(value, list):
        raise Wrong(f'"{name}" is not a list')
    return value


def _node_to_json(node: Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": node.id, "parent": node.parent, "role": node.turn.role, "content": node.turn.content}
    if node.turn.meta is not None:
        entry["meta"] = asdict(node.turn.meta)
    if node.ids:
        entry["ids"] = " ".join(map(str, node.ids))
    return entry


def _add(value: object, where: str) -> Add:
    turn = _turn(value, where)
    entry = checks.mapping(value, where)
    return Add(
        checks.whole(entry.get("id"), f"the id of {where}"),
        checks.whole(entry.get("parent"), f"the parent of {where}"),
        turn.role,
        turn.content,
        turn.meta,
        checks.ids(entry.get("ids", ""), f"the ids of {where}"),
    )


def _turn(value: object, where: str) -> Turn:
    entry = checks.mapping(value, where)
    role = checks.text(entry.get("role"), f"the role of {where}")
    content = checks.text(entry.get("content"), f"the content of {where}")
    meta = entry.get("meta")
    return Turn(role, content, None if meta is None else checks.meta(meta, f"the meta of {where}"))


def refuse_constant(name: str) -> float:
    """For `json.loads`: NaN and infinity are not JSON."""
    raise ValueError(f"{name} is not JSON")


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(256).strip()
    return not start or (start.startswith(b"{") and f'"{FORMAT}"'.encode() in start)


def write_private(path: Path, data: bytes) -> None:
    """`data` as the new content of `path`, whole or not at all; readable for its owner only. Raises SessionError."""
    write_private_pieces(path, (data,))


def write_private_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """The same for content that comes in pieces."""
    try:
        _replace(path, pieces)
    except OSError as err:
        raise SessionError(f"cannot write {clean_line(str(path))}: {err.strerror or err}") from err


def _replace(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600  # conversations are private
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            for piece in pieces:
                file.write(piece)
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
