"""JSON in a reply against the JSON that was asked for."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_FENCE = re.compile(r"```[ \t]*(?:json|JSON)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_ABSENT = object()


def find_json(text: str) -> Any:
    """The first object or list in `text`: in a fenced block if there is one, else where a bracket begins valid JSON.

    Raises ValueError when there is none.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse)
    block = _FENCE.search(text)
    for source in ([block.group(1)] if block else []) + [text]:
        at = -1
        # Brackets in running text: each is tried, and the first that begins valid JSON counts.
        for _ in range(200):
            at = min((i for i in (source.find("{", at + 1), source.find("[", at + 1)) if i >= 0), default=-1)
            if at < 0:
                break
            try:
                return decoder.raw_decode(source, at)[0]
            except (ValueError, RecursionError):
                continue
    raise ValueError("no JSON in it")


def field_accuracy(reply: str, answers: Sequence[Mapping[str, Any]]) -> float:
    """Share of fields that are right, the best over the answers: fields equal / fields in answer or reply.

    A field is a leaf, named by its path; so a missing field and an invented one both count as wrong, and only an equal
    object gives 1. Numbers are equal by value, texts after trimming; the type counts ("5" is not 5). No JSON: 0.
    """
    try:
        said = leaves(find_json(reply))
    except (ValueError, RecursionError):
        return 0.0
    return max(_agreement(said, leaves(answer)) for answer in answers)


def valid_json(reply: str) -> float:
    """1 when an object or a list can be read from the reply, else 0."""
    try:
        find_json(reply)
    except ValueError:
        return 0.0
    return 1.0


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Any]:
    """Path -> value of everything that is neither object nor list; an empty one counts as a leaf."""
    items = list(value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ())
    if not items:
        return {path: value.strip() if isinstance(value, str) else value}
    return {key: leaf for name, inner in items for key, leaf in leaves(inner, (*path, name)).items()}


def _agreement(said: Mapping[Any, Any], right: Mapping[Any, Any]) -> float:
    names = {**said, **right}
    equal = sum(_same(said.get(name, _ABSENT), right.get(name, _ABSENT)) for name in names)
    return equal / len(names)


def _same(a: Any, b: Any) -> bool:
    # True == 1 in Python, not in JSON.
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a value of JSON")
