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
from ..generation.grammar import Grammar
from ..generation.request import OVERFLOWS, Request
from ..sampling.params import SamplingParams
from ..tokenizer.template_args import check_name, checked_args, value_of

DEFAULT_MAX_TOKENS = 512
NOT_TYPED = ("sampling", "grammar", "template_args")  # two have names of their own, one has its own command
TEMPLATE = "template."  # before the name of a variable of the chat template
PLAIN = ("guidance", "negative", "thoughts")  # as JSON has them
THOUGHTS = ("show", "fold", "hide")
NOTHING = ("none", "off", "null")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplySettings:
    """max_tokens: the most tokens of one reply; stop: texts that end it; overflow: "error" | "drop" | "window".

    banned_strings: texts that never appear in it; grammar: what it has to look like.
    stop_ids: tokens that end it; stop_loop: (longest, times), it ends when up to `longest` tokens have come so
    often in a row.
    guidance: how far it is led away from what would be said with `negative` as the system prompt, or with none
    where that is empty; 1 not at all.
    template_args: variables of the chat template, name -> value as JSON has it; the others are the template's choice.
    thoughts: what is shown of what the model thinks before it answers, "show" | "fold" | "hide".
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    overflow: str = "drop"
    banned_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    stop_loop: tuple[int, int] | None = None
    grammar: Grammar | None = None
    guidance: float = 1.0
    negative: str = ""
    thoughts: str = "fold"
    template_args: Mapping[str, Any] = field(default_factory=dict)
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens!r}", hint="give a whole number of at least 1")
        for name in ("stop", "banned_strings"):
            texts = getattr(self, name)
            if isinstance(texts, str) or any(not isinstance(text, str) or not text for text in texts):
                raise UsageError(f"{name} is {texts!r}", hint="give a list of texts that are not empty")
            object.__setattr__(self, name, tuple(texts))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise UsageError(f"grammar is {self.grammar!r:.60}", hint="Grammar.json_schema(...) makes one, say")
        for name in ("stop_ids", "stop_loop"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.stop_ids, tuple) or not all(type(id) is int and id >= 0 for id in self.stop_ids):
            raise UsageError(f"stop_ids is {self.stop_ids!r:.80}", hint="give token ids; /tokens TEXT shows them")
        if not isinstance(self.negative, str):
            raise UsageError(f"negative is {self.negative!r:.60}", hint="give a text")
        object.__setattr__(self, "template_args", checked_args(self.template_args))
        other = (0,) if self.guidance != 1 else ()
        Request(prompt=(0,), stop_loop=self.stop_loop, guidance=self.guidance, negative_prompt=other)  # its checks
        if self.thoughts not in THOUGHTS:
            raise UsageError(f"thoughts is {self.thoughts!r:.60}", hint=f"use one of {', '.join(THOUGHTS)}")
        if self.overflow not in OVERFLOWS:
            raise UsageError(f"unknown overflow policy {self.overflow!r}", hint=f"use one of {', '.join(OVERFLOWS)}")

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; infinities as text."""
        sampling = {name: _plain(value) for name, value in self.sampling.to_dict().items()}
        plain = {
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
            "overflow": self.overflow,
            "sampling": sampling,
        }
        if self.banned_strings:
            plain["banned_strings"] = list(self.banned_strings)
        if self.stop_ids:
            plain["stop_ids"] = list(self.stop_ids)
        if self.stop_loop is not None:
            plain["stop_loop"] = list(self.stop_loop)
        default = ReplySettings.__dataclass_fields__
        plain |= {name: getattr(self, name) for name in PLAIN if getattr(self, name) != default[name].default}
        if self.template_args:
            plain["template_args"] = dict(self.template_args)
        if self.grammar is not None:
            plain["grammar"] = {"kind": self.grammar.kind, "text": self.grammar.text}
        return plain

    @property
    def steering(self) -> dict[str, Any]:
        """The arguments of `Runtime.stream` that are only given when they say something."""
        steering: dict[str, Any] = {
            "banned_strings": self.banned_strings,
            "stop_ids": self.stop_ids,
            "stop_loop": self.stop_loop,
            "grammar": self.grammar,
        }
        return {name: value for name, value in steering.items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ReplySettings":
        """The inverse of `to_json`; missing entries keep their defaults. Raises UsageError for anything odd."""
        if unknown := sorted(set(values) - {entry.name for entry in fields(cls)}):
            raise UsageError(f"there is no setting {unknown[0]!r}")
        given = dict(values)
        sampling = given.pop("sampling", {})
        if not isinstance(sampling, Mapping):
            raise UsageError('"sampling" is not an object')
        for name in ("stop", "banned_strings"):
            if name in given and not isinstance(given[name], list):
                raise UsageError(f'"{name}" is not a list')
        if "grammar" in given:
            given["grammar"] = _grammar(given["grammar"])
        bias = sampling.get("logit_bias", {})
        if isinstance(bias, Mapping):
            revived = {key: -math.inf if value == "-inf" else value for key, value in bias.items()}
            sampling = {**sampling, "logit_bias": revived}
        return cls(sampling=SamplingParams.from_dict(sampling), **given)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return "-inf" if value == -math.inf else value


def _grammar(value: Any) -> Grammar:
    kinds = get_args(get_type_hints(Grammar)["kind"])
    if not isinstance(value, Mapping) or set(value) != {"kind", "text"} or value["kind"] not in kinds:
        raise UsageError('"grammar" is not a kind and a text')
    if not isinstance(value["text"], str) or not value["text"]:
        raise UsageError('the text of "grammar" is not text')
    return Grammar(value["kind"], value["text"])


def setting_names() -> tuple[str, ...]:
    """Everything `/set` takes: the reply settings, then the sampling parameters."""
    own = [entry.name for entry in fields(ReplySettings) if entry.name not in NOT_TYPED]
    return (*own, *(entry.name for entry in fields(SamplingParams)))


def get_setting(settings: ReplySettings, name: str) -> Any:
    """The present value of a setting, by any spelling that `full_name` understands; None for a template variable that
    is not set."""
    name = full_name(name)
    if name.startswith(TEMPLATE):
        return settings.template_args.get(name.removeprefix(TEMPLATE))
    return getattr(settings if name in _own() else settings.sampling, name)


def change(settings: ReplySettings, name: str, text: str) -> ReplySettings:
    """`settings` with one value replaced by what `text` says. Raises UsageError naming the setting and the value.

    Numbers, true/false, and names as they are; lists separated by blanks, quoted where they hold blanks ("\\n" is a
    line break); biases as ID=NUMBER; "default" for the default, "none" for an empty list or no value.
    `value_of` says what template.NAME takes.
    """
    name = full_name(name)
    if name.startswith(TEMPLATE):
        others = {key: value for key, value in settings.template_args.items() if key != name.removeprefix(TEMPLATE)}
        new = {} if text.strip().lower() == "default" else {name.removeprefix(TEMPLATE): value_of(text)}
        return replace(settings, template_args=others | new)
    default = get_setting(ReplySettings(), name)
    kind = get_type_hints(ReplySettings if name in _own() else SamplingParams)[name]
    word = text.strip().lower()
    empty = default is None or default == "" or isinstance(default, tuple | Mapping)
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
    prefix, dot, variable = name.strip().partition(".")
    if dot and prefix.lower() == TEMPLATE[:-1]:
        return TEMPLATE + check_name(variable)  # where case matters
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
    return frozenset(entry.name for entry in fields(ReplySettings)) - set(NOT_TYPED)


def parse(name: str, kind: Any, text: str) -> Any:
    """`text` as a value of the annotated type `kind`. Raises UsageError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return parse(name, inner[0], text)
    if origin is tuple:  # how many there have to be is checked by whoever takes them
        return tuple(parse(name, arguments[0], word) for word in _words(name, text))
    if origin is not None and issubclass(origin, Mapping):
        return dict(_pair(name, arguments, word) for word in _words(name, text))
    if kind is str:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
        return text[1:-1] if quoted else text
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
    if name in ("stop", "banned_strings", "dry_sequence_breakers"):
        return [word.replace("\\n", "\n").replace("\\t", "\t") for word in words]
    return [part for word in words for part in word.split(",") if part]


def shown(value: Any) -> str:
    """A value as `change` would read it."""
    if value is None or value == "":
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
