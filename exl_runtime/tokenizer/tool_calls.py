"""Finds the calls of tools in a reply. Pure functions of text: knows no model and no protocol.

How a call is written depends on the chat template; the forms are named by their syntax:

    tagged     <tool_call> {"name": ..., "arguments": {...}} </tool_call>, or inside the tags
               <function=NAME> <parameter=KEY> value </parameter> </function>
    function   <function=NAME> {...} </function>
    list       [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]NAME[ARGS]{...}, to the end
    python     <|python_tag|> {"name": ..., "parameters": {...}}; ..., to the end
    sections   <calls begin> <call begin> function <sep> NAME ```json {...} ``` <call end> ... <calls end>, or
               NAME <sep> {...} in between; the marks as `_wide` writes them
    piped      <|tool_call|> [{"name": ..., "arguments": {...}}, ...] <|/tool_call|>, where tools stand in <|tool|>
    named list functools[{"name": ..., "arguments": {...}}, ...], to the end, there too
    bare       a reply that begins with {"name": ..., "parameters": {...}}: nothing else in it
    fenced     ```json {"name": ..., "arguments": {...}} ```

The last two also mean ordinary JSON, so there the name has to be one of the tools that were offered. What is not a
valid call stays text: nothing of a reply is lost but the blank space around calls.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from .reasoning import partial_end

_NAME = re.compile(r"[\w.:-]{1,128}")
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*)?\Z", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_ARGS = re.compile(r"\s*([\w.:-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")
_NAME_AND_FENCE = re.compile(r"\s*([\w.:-]+)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_BARE_LENGTH = 40  # characters that tell whether a reply is a bare call
_BARE = re.compile(r'\{\s*"(?:name|function|type|id|arguments|parameters)"')


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call: the name of the tool and its arguments, a JSON object as text."""

    name: str
    arguments: str


Piece: TypeAlias = "str | ToolCall"
Schemas: TypeAlias = Mapping[str, Mapping[str, Any]]  # tool name -> JSON schema of its arguments


@dataclass(frozen=True, slots=True)
class Syntax:
    """One way of writing calls: what they begin with, what they end with ("": the reply's end), what is between.

    inner   further marks, which may be special tokens as the outer ones
    marker  what a template spells out that means it; "": the opening
    """

    opening: str
    closing: str
    read: Callable[[str, Schemas], list[ToolCall] | None]
    inner: tuple[str, ...] = ()
    marker: str = ""

    @property
    def marks(self) -> frozenset[str]:
        """All texts that belong to the form itself."""
        return frozenset((self.opening, self.closing, *self.inner)) - {""}


def syntaxes_of(templates: Mapping[str, str]) -> tuple[Syntax, ...]:
    """Those that a model's chat templates spell out, and the fence, which every model may use."""
    source = "\0".join(templates.values())
    known = (TAGGED, LIST, PYTHON, SECTIONS, PIPED, NAMED_LIST)
    found = [syntax for syntax in known if (syntax.marker or syntax.opening) in source]
    if TAGGED not in found and FUNCTION.opening in source:
        found.append(FUNCTION)
    return (*found, FENCED)


class ToolCallParser:
    """One reply: push its text as it comes; take text and calls out, in order."""

    def __init__(self, syntaxes: tuple[Syntax, ...], schemas: Schemas) -> None:
        """`schemas`: the tools that were offered."""
        self._syntaxes = syntaxes
        self._schemas = schemas
        self._held = ""
        self._gap = ""  # blank space before an opening mark: it goes if a call follows
        self._inside: Syntax | None = None
        self._seen = 0  # up to where a closing mark was looked for
        self._at_start = True  # nothing but blank space so far
        self._after_call = False

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._held += text
        found: list[Piece] = []
        while (self._inside is not None or self._open(found)) and self._close(found):
            pass
        return found

    def finish(self) -> list[Piece]:
        """No more text comes."""
        found: list[Piece] = []
        while (syntax := self._inside) is not None:
            body, self._held, self._inside = self._held, "", None
            if calls := syntax.read(body, self._schemas):  # the last closing mark may be missing
                return found + calls
            self._at_start = False
            self._emit(self._gap + syntax.opening, found)
            found += self.push(body)
        rest, self._held = self._held, ""
        self._emit(rest, found)
        return found

    def _open(self, found: list[Piece]) -> bool:
        """Let out the text before the next opening mark. False if there is none yet."""
        if self._at_start and _may_be_bare(self._held):
            self._enter(BARE, "", self._held)
            return True
        places = [(at, s) for s in self._syntaxes if (at := self._held.find(s.opening)) >= 0]
        if places:
            at, syntax = min(places, key=lambda place: place[0])
            before = self._held[:at]
            text = before.rstrip()
            self._emit(text, found)
            self._enter(syntax, before[len(text) :], self._held[at + len(syntax.opening) :])
            return True
        keep = max(partial_end(self._held, syntax.opening) for syntax in self._syntaxes)
        certain = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(certain) :]
        self._emit(certain, found)
        return False

    def _enter(self, syntax: Syntax, gap: str, rest: str) -> None:
        self._inside, self._gap, self._held, self._seen = syntax, gap, rest, 0

    def _close(self, found: list[Piece]) -> bool:
        """Let out the calls up to the closing mark, or the text if they are none. False if the mark is yet to come."""
        syntax = self._inside
        if syntax is None or (syntax is BARE and not _may_be_bare(self._held)):
            self._inside, self._at_start = None, False
            return True
        while syntax.closing and (at := self._held.find(syntax.closing, self._seen)) >= 0:
            body, self._seen = self._held[:at], at + len(syntax.closing)
            if _amid_string(body):
                continue
            self._inside, self._held = None, self._held[self._seen :]
            if calls := syntax.read(body, self._schemas):
                found += calls
                self._at_start, self._after_call = False, True
            else:
                self._emit(self._gap + syntax.opening + body + syntax.closing, found)
            return True
        self._seen = max(self._seen, len(self._held) - len(syntax.closing) + 1)
        return False

    def _emit(self, text: str, found: list[Piece]) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            found.append(text)
        if text.strip():
            self._at_start = self._after_call = False


def _may_be_bare(text: str) -> bool:
    """Whether the reply may be nothing but a call. Its first characters decide, lest the cuts of the text matter."""
    begin = text.lstrip()[:_BARE_LENGTH]
    if len(begin) < _BARE_LENGTH:
        return begin.startswith("{")
    return _BARE.match(begin) is not None


def _amid_string(body: str) -> bool:
    """Whether JSON that begins like this is inside of a string at its end."""
    if body.lstrip()[:1] not in ("{", "["):
        return False
    return _ESCAPED.sub("", body).count('"') % 2 == 1


def _call(value: Any) -> ToolCall | None:
    """The call an object describes; None if it describes none."""
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name", inner if isinstance(inner, str) else None)
    arguments = next((value[key] for key in ("arguments", "parameters", "args") if key in value), {})
    if isinstance(arguments, str) and (arguments := _loads(arguments)) is None:
        return None
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict | None):
        return None
    return ToolCall(name, json.dumps(arguments or {}, ensure_ascii=False))


def _loads(text: str) -> Any:
    """Parsed JSON; line ends inside of strings are let through, as models write them. None if it is none."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _values(text: str) -> list[Any] | None:
    """JSON values one after another, with blank space, commas or semicolons between. None if anything else is there."""
    decoder, values, at = json.JSONDecoder(strict=False), [], 0
    try:
        while at < len(text):
            if text[at] in " \t\r\n;,":
                at += 1
                continue
            value, at = decoder.raw_decode(text, at)
            values += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        return None
    return values


def _json_calls(body: str, schemas: Schemas) -> list[ToolCall] | None:
    values = _values(body)
    if not values:
        return None
    calls = [_call(value) for value in values]
    return None if None in calls else calls  # type: ignore[return-value]


def _offered_calls(body: str, schemas: Schemas) -> list[ToolCall] | None:
    calls = _json_calls(body, schemas)
    return calls if calls and all(call.name in schemas for call in calls) else None


def _tagged_calls(body: str, schemas: Schemas) -> list[ToolCall] | None:
    found = _FUNCTION.match(body)
    if found is None:
        return _json_calls(body, schemas)
    name, inner = found[1].strip(), found[2]
    properties = schemas.get(name, {}).get("properties", {})
    arguments = {key.strip(): _typed(text, properties, key.strip()) for key, text in _PARAMETER.findall(inner)}
    if not arguments and inner.strip():
        return _function_calls(f"{name}>{inner}", schemas)
    return [ToolCall(name, json.dumps(arguments, ensure_ascii=False))] if _NAME.fullmatch(name) else None


def _typed(text: str, properties: Any, key: str) -> Any:
    """A parameter written as plain text, as the type its schema asks for."""
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string" or kind is None:
        return text
    value = _loads(text)
    return text if value is None and text.strip() != "null" else value


def _function_calls(body: str, schemas: Schemas) -> list[ToolCall] | None:
    name, mark, inner = body.partition(">")
    arguments = _loads(inner) if inner.strip() else {}
    return [call] if mark and (call := _call({"name": name.strip(), "arguments": arguments})) else None


def _list_calls(body: str, schemas: Schemas) -> list[ToolCall] | None:
    calls: list[ToolCall] = []
    for part in body.split(LIST.opening):
        if found := _ARGS.match(part):
            arguments = _loads(part[found.end() :])
            named = _call({"name": found[1], "arguments": arguments}) if isinstance(arguments, dict) else None
            some = [named] if named else None
        else:
            some = _json_calls(part, schemas)
        if not some:
            return None
        calls += some
    return calls


def _section_calls(body: str, schemas: Schemas) -> list[ToolCall] | None:
    calls: list[ToolCall] = []
    for part in body.split(CALL_BEGIN)[1:]:
        head, mark, rest = part.partition(CALL_END)[0].partition(SEPARATOR)
        if fenced := _NAME_AND_FENCE.fullmatch(rest):
            head, rest = fenced.groups()
        arguments = _loads(rest)
        call = _call({"name": head.strip(), "arguments": arguments}) if isinstance(arguments, dict) else None
        if not mark or call is None:
            return None
        calls.append(call)
    return calls


def _named_list_calls(body: str, schemas: Schemas) -> list[ToolCall] | None:
    return _json_calls(f"[{body}", schemas)


def _wide(name: str) -> str:
    """A mark with full-width bars, and a low line block for every blank, as some vocabularies spell them."""
    return f"<\uff5c{name}\uff5c>".replace(" ", "\u2581")


CALL_BEGIN, SEPARATOR, CALL_END = _wide("tool call begin"), _wide("tool sep"), _wide("tool call end")
TAGGED = Syntax("<tool_call>", "</tool_call>", _tagged_calls)
FUNCTION = Syntax("<function=", "</function>", _function_calls)
LIST = Syntax("[TOOL_CALLS]", "", _list_calls, inner=("[ARGS]", "[CALL_ID]"))
PYTHON = Syntax("<|python_tag|>", "", _json_calls)
SECTIONS = Syntax(
    _wide("tool calls begin"), _wide("tool calls end"), _section_calls, inner=(CALL_BEGIN, SEPARATOR, CALL_END)
)
PIPED = Syntax("<|tool_call|>", "<|/tool_call|>", _json_calls, marker="<|tool|>")
NAMED_LIST = Syntax("functools[", "", _named_list_calls, marker="<|tool|>")
BARE = Syntax("", "", _offered_calls)
FENCED = Syntax("```json", "```", _offered_calls)
