"""Values that came out of a file, checked one by one. Knows JSON and the parts of a conversation; knows no files."""

from dataclasses import fields
from typing import Any

from ..console.terminal import clean_line
from .turn import ReplyMeta

MOST = 1 << 53  # no count of tokens or seconds comes near it


class Wrong(Exception):
    """A value that must not be there, in words."""


def mapping(value: object, where: str) -> dict[str, Any]:
    """A JSON object. Raises Wrong."""
    if not isinstance(value, dict):
        raise Wrong(f"{where} is not an object")
    return value


def text(value: object, where: str) -> str:
    """Text that can be written as UTF-8. Raises Wrong."""
    if not isinstance(value, str):
        raise Wrong(f"{where} is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as err:
        raise Wrong(f"{where} holds half a character") from err
    return value


def whole(value: object, where: str) -> int:
    """A whole number from 0 up. Raises Wrong."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Wrong(f"{where} is not a whole number")
    if not 0 <= value < MOST:
        raise Wrong(f"{where} is out of range")
    return value


def ids(value: object, where: str) -> tuple[int, ...]:
    """Token ids, written as one text with blanks between them. Raises Wrong."""
    words = text(value, where).split()
    if any(not word.isascii() or not word.isdecimal() or len(word) > 15 for word in words):
        raise Wrong(f"{where} are not token ids")
    return tuple(map(int, words))


def meta(value: object, where: str) -> ReplyMeta:
    """The numbers of a reply. Raises Wrong."""
    given = mapping(value, where)
    known = {entry.name: entry.type for entry in fields(ReplyMeta)}
    if unknown := sorted(set(given) - set(known)):
        raise Wrong(f"{where} has the unknown entry {clean_line(repr(unknown[0]), 40)}")
    for name, kind in known.items():
        entry = given.get(name, 0 if name.startswith(("dropped", "thought")) else None)
        if kind is str:
            text(entry, f"{name} in {where}")
        elif isinstance(entry, bool) or not isinstance(entry, int if kind is int else (int, float)):
            raise Wrong(f"{name} in {where} is not a number")
        elif not 0 <= entry < MOST:  # NaN fails both
            raise Wrong(f"{name} in {where} is out of range")
    return ReplyMeta(**given)
