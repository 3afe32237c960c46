"""How replies are made: one frozen object, changed by name with values typed by a person. Knows no model.

The sampling parameters check themselves (`SamplingParams`); this module turns text into their types, and back.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError
from ..generation.request import OVERFLOWS
from ..sampling.params import SamplingParams

DEFAULT_MAX_TOKENS = 512
NOTHING = ("none", "off", "null")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplySettings:
    """max_tokens: the most tokens of one reply; stop: texts that end it; overflow: "error" | "drop" | "window"."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    overflow: str = "drop"
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens!r}", hint="give a whole number of at least 1")
        if isinstance(self.stop, str) or any(not isinstance(text, str) or not text for text in self.stop):
            raise UsageError(f"stop is {self.stop!r}", hint="give a list of texts that are not empty")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.overflow not in OVERFLOWS:
            raise UsageError(f"unknown overflow policy {self.overflow!r}", hint=f"use one of {', '.join(OVERFLOWS)}")

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; infinities as text."""
        sampling = {name: _plain(value) for name, value in self.sampling.to_dict().items()}
        return {"max_tokens": self.max_tokens, "stop": list(self.stop), "overflow": self.overflow, "sampling": sampling}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ReplySettings":
        """The inverse of `to_json`; missing entries keep their defaults. Raises UsageError for anything odd."""
        if unknown := sorted(set(values) - {entry.name for entry in fields(cls)}):
            raise UsageError(f"there is no setting {unknown[0]!r}")
        given = dict(values)
        sampling = given.pop("sampling", {})
        if not isinstance(sampling, Mapping):
            raise UsageError('"sampling" is not an object')
        if "stop" in given and not isinstance(given["stop"], list):
            raise UsageError('"stop" is not a list')
        bias = sampling.get("logit_bias", {})
        if isinstance(bias, Mapping):
            revived = {key: -math.inf if value == "-inf" else value for key, value in bias.items()}
            sampling = {**sampling, "logit_bias": revived}
        return cls(sampling=SamplingParams.from_dict(sampling), **given)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return "-inf" if value == -math.inf else value


def setting_names() -> tuple[str, ...]:
    """Everything `/set` takes: the reply settings, then the sampling parameters."""
    own = [entry.name for entry in fields(ReplySettings) if entry.name != "sampling"]
    return (*own, *(entry.name for entry in fields(SamplingParams)))


def get_setting(settings: ReplySettings, name: str) -> Any:
    """The present value of a setting, by any spelling that `full_name` understands."""
    name = full_name(name)
    return getattr(settings if name in _own() else settings.sampling, name)


def change(settings: ReplySettings, name: str, text: str) -> ReplySettings:
    """`settings` with one value replaced by what `text` says. Raises UsageError naming the setting and the value.

    Numbers, true/false, and names as they are; lists separated by blanks, quoted where they hold blanks ("\\n" is a
    line break); biases as ID=NUMBER; "default" for the default, "none" for an empty list or no value.
    """
    name = full_name(name)
    default = get_setting(ReplySettings(), name)
    kind = get_type_hints(ReplySettings if name in _own() else SamplingParams)[name]
    word = text.strip().lower()
    empty = default is None or isinstance(default, tuple | Mapping)
    if word == "default":
        value = default
    elif word in NOTHING and empty:
        value = () if isinstance(default, tuple) else default
    else:
        value = parse(name, kind, text)
    if name in _own():
        return replace(settings, **{name: value})
    return replace(settings, sampling=replace(settings.sampling, **{name: value}))


def full_name(name: str) -> str:
    """The setting meant by `name` (dashes and case do not matter). Raises UsageError offering the nearest."""
    wanted = name.strip().lower().replace("-", "_")
    names = setting_names()
    if wanted in names:
        return wanted
    if wanted in ("temp", "t"):
        return "temperature"
    near = get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "/set alone lists them all"
    raise UsageError(f"there is no setting {name!r}", hint=hint)


def _own() -> frozenset[str]:
    return frozenset(entry.name for entry in fields(ReplySettings)) - {"sampling"}


def parse(name: str, kind: Any, text: str) -> Any:
    """`text` as a value of the annotated type `kind`. Raises UsageError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return parse(name, inner[0], text)
    if origin is tuple:
        return tuple(parse(name, arguments[0], word) for word in _words(name, text))
    if origin is not None and issubclass(origin, Mapping):
        return dict(_pair(name, arguments, word) for word in _words(name, text))
    if kind is str:
        return text
    try:
        if kind is bool:
            return {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}[text.lower()]
        return kind(text.strip())
    except (ValueError, KeyError, OverflowError) as err:
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, kind.__name__)
        raise UsageError(f"{name} must be {wanted}, got {text!r}") from err


def _pair(name: str, kinds: Sequence[Any], word: str) -> tuple[Any, Any]:
    key, separator, value = word.partition("=")
    if not separator:
        raise UsageError(f"{name}: {word!r} is not ID=NUMBER", hint=f"for example: {name} 42=-5 7=-inf")
    return parse(name, kinds[0], key), parse(name, kinds[1], value)


def _words(name: str, text: str) -> list[str]:
    try:
        words = shlex.split(text, posix=True)
    except ValueError as err:
        raise UsageError(f"{name}: {text!r} has a quote that is not closed") from err
    if name in ("stop", "dry_sequence_breakers"):
        return [word.replace("\\n", "\n").replace("\\t", "\t") for word in words]
    return [part for word in words for part in word.split(",") if part]


def shown(value: Any) -> str:
    """A value as `change` would read it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={inner:g}" for key, inner in value.items()) or "none"
    if isinstance(value, tuple):
        words = [str(word).replace("\n", "\\n").replace("\t", "\\t") for word in value]
        return " ".join(shlex.quote(word) if isinstance(value[0], str) else word for word in words) or "none"
    return str(value)
