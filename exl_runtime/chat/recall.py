"""What conversations of the past said, for guesses ahead: a list repeated, a program changed in one line.

Guesses change no token, so nothing here has to be complete. Bounded: the latest texts only.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SessionError
from . import store
from .session_file import read_session
from .tree import Node

if TYPE_CHECKING:
    from ..runtime import Runtime

MOST = 100_000  # characters of one conversation; takes about 60 ms
MOST_KEPT = 50_000  # characters of all the others together,
CHATS = 16  # of which so many are looked at, the latest first,
LARGEST = 1 << 20  # if their files have no more bytes than this: a start must not wait


def recall(runtime: "Runtime", nodes: Iterable[Node], most: int = MOST) -> int:
    """Let the texts of these messages, the newest first up to `most` characters, be guessed from; the characters."""
    texts: list[str] = []
    total = 0
    for node in reversed(list(nodes)):
        if total >= most:
            break
        texts.append(node.turn.content[-(most - total) :])
        total += len(texts[-1])
    for text in reversed(texts):  # the newest last: they stay longest
        if text:
            runtime.remember(text)
    return total


def recall_kept(runtime: "Runtime", besides: Path | None = None) -> int:
    """The same for the kept conversations other than `besides`; the characters. Damaged ones are passed over."""
    found, left = [], MOST_KEPT
    for path in store.paths()[:CHATS]:
        if path == besides or left <= 0:
            continue
        try:
            if path.stat().st_size > LARGEST:
                continue
            nodes = list(read_session(path)[0].tree.nodes.values())
        except (SessionError, OSError):
            continue
        size = min(left, sum(len(node.turn.content) for node in nodes))
        found.append((nodes, size))
        left -= size
    return sum(recall(runtime, nodes, size) for nodes, size in reversed(found))
