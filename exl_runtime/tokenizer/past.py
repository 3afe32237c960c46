"""What has left a conversation, in 16 bytes: a digest of the messages, in order. Whoever lost the same ones says the
same, however many left at a time and whoever kept count: a session, or a client that sends everything each time."""

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

NOTHING = b""
T = TypeVar("T")


def past_of(messages: Sequence[Mapping[str, Any]], before: bytes = NOTHING) -> bytes:
    """The digest of these messages, which followed those of `before`."""
    for message in messages:
        text = json.dumps(message, sort_keys=True, ensure_ascii=False, default=str)
        before = blake2b(before + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return before


class Past:
    """`past_of` of the first messages of a conversation, again and again: only what is new is read."""

    def __init__(self) -> None:
        self._known: list[tuple[object, bytes]] = []  # what stands there, and the digest up to it

    def of(self, turns: Sequence[T], message: Callable[[T], Mapping[str, Any]]) -> bytes:
        """The digest of the messages of `turns`, which do not change; other ones may come in their place."""
        known = self._known
        same = next((i for i, (one, (two, _)) in enumerate(zip(turns, known, strict=False)) if one is not two), None)
        del known[len(turns) if same is None else same :]
        for turn in turns[len(known) :]:
            known.append((turn, past_of([message(turn)], known[-1][1] if known else NOTHING)))
        return known[-1][1] if known else NOTHING
