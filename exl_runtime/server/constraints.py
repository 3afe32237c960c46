"""What a reply has to look like, from response_format, tool_choice and the fields of other servers."""

from collections.abc import Sequence
from typing import Any

from ..generation.grammar import Grammar
from .fields import Fields
from .messages import Tool
from .problems import ApiError

GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
MAKERS = (Grammar.json_schema, Grammar.regex, Grammar.choice, Grammar.lark)


def read_guide(given: Fields) -> Grammar | None:
    """guided_json | guided_regex | guided_choice | guided_grammar (Lark), or json, regex, choice, grammar inside of
    structured_outputs: at most one. Raises UsageError, ApiError."""
    values = {name: value for name in GUIDES if (value := given.take(name)) is not None}
    inner = Fields(given.mapping("structured_outputs"), "structured_outputs.")
    values |= {name: value for name in GUIDES if (value := inner.take(name.removeprefix("guided_"))) is not None}
    if inner.flag("json_object", False):
        values["guided_json"] = {"type": "object"}
    inner.done()
    if len(values) > 1:
        raise ApiError(400, f"only one of {', '.join(values)} can be used at a time", param=next(iter(values)))
    for name, value in values.items():
        return MAKERS[GUIDES.index(name)](value)
    return None


def read_format(given: Fields) -> Grammar | None:
    """response_format of the protocol: text, json_object, json_schema. Raises ApiError."""
    value = given.mapping("response_format")
    kind = value.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_schema({"type": "object"})
    if kind != "json_schema":
        raise ApiError(400, "response_format.type must be text, json_object or json_schema", param="response_format")
    inner = value.get("json_schema")
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise ApiError(400, "response_format.json_schema.schema must be an object", param="response_format")
    return Grammar.json_schema(inner["schema"])


def forced_call(tools: Sequence[Tool], choice: str) -> Grammar:
    """A reply that is one call, of the tool named `choice` or, with "required", of any."""
    calls: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": tool.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
        if choice in ("required", tool.name)
    ]
    return Grammar.json_schema(calls[0] if len(calls) == 1 else {"anyOf": calls})
