"""What can happen to a conversation, one small record each, and the same as JSON for the journal.

A conversation is its steps put together (`Tree.take`): what a session does and what is read back after a crash cannot
differ. Knows no files and no models.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeAlias

from . import checks
from .checks import Wrong
from .turn import ReplyMeta


@dataclass(frozen=True, slots=True)
class Add:
    """A new message after `parent` (0: at the start); the conversation stands there from now on."""

    id: int
    parent: int
    role: str
    content: str
    meta: ReplyMeta | None = None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Grow:
    """The next piece of a reply that is being made, and its tokens."""

    id: int
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settle:
    """What a reply came to in the end (`meta` None: not in the end, but so far)."""

    id: int
    content: str
    meta: ReplyMeta | None
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Go:
    """The conversation stands after message `id` (0: before everything)."""

    id: int


@dataclass(frozen=True, slots=True)
class Remove:
    """A message and everything after it is gone."""

    id: int


@dataclass(frozen=True, slots=True)
class Name:
    """The branch that ends with message `id` has a name; an empty one takes it away."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class System:
    """Another system prompt, or none."""

    text: str | None


@dataclass(frozen=True, slots=True)
class Settings:
    """Other reply settings, as JSON values."""

    values: Mapping[str, Any] = field(hash=False)


Step: TypeAlias = Add | Grow | Settle | Go | Remove | Name | System | Settings
KINDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Add, Grow, Settle, Go, Remove, Name, System, Settings)
}


def to_json(step: Step) -> dict[str, Any]:
    """Values that JSON can hold."""
    entry: dict[str, Any] = {"step": type(step).__name__.lower()}
    for spec in fields(step):
        value = getattr(step, spec.name)
        if isinstance(value, ReplyMeta):
            value = asdict(value)
        elif isinstance(value, tuple):
            value = " ".join(map(str, value))
        elif isinstance(value, Mapping):
            value = dict(value)
        entry[spec.name] = value
    return entry


def from_json(value: object) -> Step:
    """The inverse of `to_json`. Raises Wrong."""
    entry = checks.mapping(value, "a step")
    kind = KINDS.get(str(entry.get("step")))
    if kind is None:
        raise Wrong("it is no step this version knows")
    names = [spec.name for spec in fields(kind)]
    if set(entry) != {"step", *names}:
        raise Wrong(f"a step {entry['step']} has other entries than {', '.join(names)}")
    return kind(**{name: _value(name, entry[name]) for name in names})


def _value(name: str, value: object) -> Any:
    if name in ("id", "parent"):
        return checks.whole(value, name)
    if name == "ids":
        return checks.ids(value, "ids")
    if name == "meta":
        return None if value is None else checks.meta(value, "the meta")
    if name == "values":
        return checks.mapping(value, "settings")
    if name == "text" and value is None:  # of System; Grow is checked when it is taken
        return None
    return checks.text(value, name)
