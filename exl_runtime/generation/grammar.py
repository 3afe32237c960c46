"""What a reply has to look like: a JSON schema, a regular expression, a grammar, a choice. Data only."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import Self

from ..errors import UsageError


@dataclass(frozen=True, slots=True)
class Grammar:
    """Made by one of the four functions below. The text is checked when the first request uses it."""

    kind: Literal["json_schema", "regex", "lark", "choice"]
    text: str

    @classmethod
    def json_schema(cls, schema: "str | bool | Mapping[str, Any]") -> Self:
        """JSON that is valid under `schema` (JSON Schema, parsed or as text; {} or True: any JSON).

        Raises UsageError when a text is not JSON. A keyword that cannot be enforced is refused at the first use.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as err:
                raise UsageError(
                    f"the JSON schema is not JSON: {err}", hint="give a schema, parsed or as text"
                ) from err
        if not isinstance(schema, Mapping | bool):
            raise UsageError(f"a JSON schema is an object, not {type(schema).__name__}")
        return cls("json_schema", json.dumps({} if schema is True else schema))

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Text that matches all of `pattern` (Rust syntax: no look-around, no back-references)."""
        return cls("regex", _text(pattern, "a regular expression"))

    @classmethod
    def lark(cls, text: str) -> Self:
        """Text that `start` of this grammar derives (Lark's EBNF, as llguidance reads it)."""
        return cls("lark", _text(text, "a grammar"))

    @classmethod
    def choice(cls, options: Sequence[str]) -> Self:
        """One of these texts."""
        if isinstance(options, str) or not options or any(not isinstance(o, str) or not o for o in options):
            raise UsageError(f"a choice needs a list of texts that are not empty, got {options!r:.60}")
        return cls("choice", json.dumps(list(options)))


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{what} is a text that is not empty, got {value!r:.60}")
    return value
