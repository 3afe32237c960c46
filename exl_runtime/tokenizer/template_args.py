"""Variables that a person sets for a chat template, such as enable_thinking: their names, and values typed as text.

Knows no template: which of them one reads, `ChatTemplate.variables` says. Imports nothing heavy: `--help` needs it.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ..errors import UsageError

# What the runtime itself gives a template, and what its language calls so.
RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt"}
    | {f"{role}_token" for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
    | {"additional_special_tokens", "range", "cycler", "joiner", "namespace", "dict"}
    | {"raise_exception", "strftime_now", "loop", "self", "super", "caller", "varargs", "kwargs"}
    | {"true", "false", "none", "True", "False", "None"}
)
WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def check_name(name: Any) -> str:
    """`name`, if a template variable can be called so. Raises UsageError."""
    if not isinstance(name, str) or not name.isidentifier():
        raise UsageError(
            f"{name!r:.80} is no name of a template variable", hint="letters, digits and _, as in enable_thinking"
        )
    if name in RESERVED:
        raise UsageError(
            f"the template variable {name} cannot be set", hint="it belongs to the conversation or to the model"
        )
    return name


def checked_args(given: Any) -> dict[str, Any]:
    """Name -> value as a copy that JSON can hold, so that it can be kept. Raises UsageError naming the variable."""
    if not isinstance(given, Mapping):
        raise UsageError(f"template_args is {given!r:.80}", hint='give names and values: {"enable_thinking": False}')
    found = {}
    for name, value in given.items():
        try:
            found[check_name(name)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as err:
            raise UsageError(
                f"the template variable {name} is {value!r:.60}",
                hint="give what JSON has: a text, a number, a list ...",
            ) from err
    return found


def value_of(text: str) -> Any:
    """What a person means by `text`: true, false, on, off, yes or no in any case; else JSON; else the text itself."""
    text = text.strip()
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text


def spelled(value: Any) -> str:
    """A value as `value_of` would read it."""
    if isinstance(value, str) and value and value_of(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def name_and_value(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`. Raises UsageError."""
    name, sign, value = text.partition("=")
    if not sign:
        raise UsageError(f"{text!r:.80} is not NAME=VALUE", hint="for example enable_thinking=false")
    return check_name(name.strip()), value_of(value)


def unmentioned_line(names: Iterable[str]) -> str:
    """What to tell a person who sets variables that the template never reads."""
    names = sorted(names)
    what = "variable" if len(names) == 1 else "variables"
    return f"the chat template never mentions the {what} {', '.join(names)}: setting it has no effect"


def _no_number(word: str) -> NoReturn:
    raise ValueError(word)  # NaN and Infinity are no JSON: a text like any other
