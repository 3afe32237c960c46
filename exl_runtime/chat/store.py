"""The folder in which conversations are kept by themselves: names for new ones, the list, the search.

Private to the user, below the state folder of the desktop (XDG). Knows files, no runtime and no terminal.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..console.terminal import state_dir
from ..errors import SessionError
from .history import Transcript
from .journal import journal_path
from .session_file import read_session

AROUND = 30  # characters shown on each side of what was searched for


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One kept conversation. `messages`: of the user, in all branches; `problem`: why it cannot be read."""

    number: int
    path: Path
    changed: float
    title: str = ""
    messages: int = 0
    model: str = ""
    problem: str = ""
    transcript: Transcript | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """A message in which all words were found, and the text around the first of them."""

    stored: Stored
    role: str
    excerpt: str


def chats_dir() -> Path:
    """Where conversations are kept."""
    return state_dir() / "chats"


def new_path() -> Path:
    """A file for a new conversation; names sort by their beginning."""
    return chats_dir() / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(2)}.json"


def paths() -> list[Path]:
    """The kept conversations, the one that changed last first."""
    try:
        found = [(_changed(path), path) for path in chats_dir().glob("*.json")]
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True)]


def stored() -> list[Stored]:
    """The kept conversations, numbered from 1, the one that changed last first. Damaged ones say so."""
    return [_look(number, path) for number, path in enumerate(paths(), start=1)]


def find(wanted: str) -> Path | None:
    """The kept conversation with this number in the list, or this name with or without its ending."""
    known = paths()
    if wanted.isdecimal() and 1 <= int(wanted) <= len(known):
        return known[int(wanted) - 1]
    return next((path for path in known if wanted in (path.name, path.stem)), None)


def search(words: Sequence[str], chats: Sequence[Stored]) -> Iterator[Hit]:
    """Messages that hold every one of `words`, whatever their case."""
    wanted = [word.casefold() for word in words]
    for chat in chats:
        for node in chat.transcript.tree.nodes.values() if chat.transcript else ():
            content = " ".join(node.turn.content.split())
            folded = content.casefold()
            if all(word in folded for word in wanted):
                yield Hit(chat, node.turn.role, _around(content, folded.find(wanted[0]), len(wanted[0])))


def _around(text: str, place: int, length: int) -> str:
    start, stop = max(0, place - AROUND), place + length + AROUND
    return ("…" if start else "") + text[start:stop] + ("…" if stop < len(text) else "")


def _look(number: int, path: Path) -> Stored:
    changed = _changed(path)
    try:
        transcript, _ = read_session(path)
    except SessionError as err:
        return Stored(number=number, path=path, changed=changed, problem=err.problem)
    said = [node.turn.content for node in transcript.tree.nodes.values() if node.turn.role == "user"]
    return Stored(
        number=number,
        path=path,
        changed=changed,
        title=said[0] if said else "",
        messages=len(said),
        model=transcript.model,
        transcript=transcript,
    )


def _changed(path: Path) -> float:
    times = [0.0]
    for one in (path, journal_path(path)):
        try:
            times.append(one.stat().st_mtime)
        except OSError:
            continue
    return max(times)
