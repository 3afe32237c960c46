"""Conversations as clients send them, as chat templates want them; and tools for templates that know none."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tokenizer.tool_calls import ToolCall
from .fields import Fields
from .problems import ApiError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MOST_TOOLS = 256
HOW_TO_CALL = (
    "You can call these tools:\n\n{tools}\n\n"
    "To call one, answer with nothing but a block like this, and wait for the result:\n"
    '```json\n{{"name": "NAME", "arguments": {{"KEY": "VALUE"}}}}\n```'
)


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that the model may call, and the object the template is shown."""

    name: str
    parameters: Mapping[str, Any]
    given: Mapping[str, Any]


def read_messages(values: list[Any]) -> list[dict[str, Any]]:
    """Messages with plain text as content. Raises ApiError naming the message that is wrong."""
    if not values:
        raise ApiError(400, "messages is empty: there is nothing to answer", param="messages")
    return [_message(value, f"messages[{i}]") for i, value in enumerate(values)]


def read_tools(values: list[Any]) -> tuple[Tool, ...]:
    """The functions a request offers. Raises ApiError."""
    if len(values) > MOST_TOOLS:
        raise ApiError(400, f"{len(values)} tools are too many, at most {MOST_TOOLS} are allowed", param="tools")
    tools = []
    for index, value in enumerate(values):
        where = f"tools[{index}]"
        inner = value.get("function") if isinstance(value, dict) else None
        if not isinstance(inner, dict) or value.get("type", "function") != "function":
            raise ApiError(400, f'{where} must be {{"type": "function", "function": {{...}}}}', param="tools")
        fields = Fields(inner, f"{where}.function.")
        name, parameters = fields.text("name"), fields.mapping("parameters")
        if not name:
            raise ApiError(400, f"{where}.function has no name", param="tools")
        fields.ignore("description", "strict", "return", "returns")
        fields.done()
        tools.append(Tool(name, parameters, {"type": "function", "function": inner}))
    return tuple(tools)


def plain_conversation(messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The same conversation for a template that knows no tools: described in the system message, called in fenced
    JSON, answered by the user."""
    plain = []
    for message in messages:
        content = message.get("content") or ""
        if calls := message.get("tool_calls"):
            content = "\n".join(filter(None, (content, *map(_fenced, calls))))
            plain.append({"role": "assistant", "content": content})
        elif message["role"] == "tool":
            name = message.get("name")
            plain.append(
                {"role": "user", "content": f"Result of {name}:\n{content}" if name else f"Result:\n{content}"}
            )
        else:
            plain.append(message)
    if tools:
        listed = "\n".join(json.dumps(tool.given["function"], ensure_ascii=False) for tool in tools)
        text = HOW_TO_CALL.format(tools=listed)
        if plain[0]["role"] == "system":
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object with role and content", param="messages")
    fields = Fields(value, f"{where}.")
    role = ROLES[fields.choice("role", tuple(ROLES), "")] if "role" in value else None
    if role is None:
        raise ApiError(400, f"{where} has no role", param="messages")
    message: dict[str, Any] = {"role": role}
    content, calls = fields.take("content"), fields.items("tool_calls")
    if content is None and not (calls and role == "assistant"):
        raise ApiError(400, f"{where} has no content", param="messages")
    message["content"] = "" if content is None else _text(content, where)
    if calls:
        message["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (text := fields.text(name)) is not None:
            message[name] = text
    fields.ignore("refusal", "annotations", "audio", "function_call", "reasoning")
    fields.done()
    return message


def _text(content: Any, where: str) -> str:
    """A text, or a list of text parts put together."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content must be a text or a list of parts", param="messages")
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ApiError(400, f"{where}.content: this server takes text, not {kind!r:.40}", param="messages")
        texts.append(part["text"])
    return "".join(texts)


def _call(value: Any, where: str) -> dict[str, Any]:
    """An earlier call; its arguments become an object, which is what templates print."""
    inner = value.get("function") if isinstance(value, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ApiError(400, f"{where} must be an object with function.name and function.arguments", param="messages")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as err:
            raise ApiError(400, f"{where}.function.arguments is not valid JSON", param="messages") from err
    return {
        "id": str(value.get("id", "")),
        "type": "function",
        "function": {"name": inner["name"], "arguments": arguments},
    }


def _fenced(call: dict[str, Any]) -> str:
    inner = call["function"]
    made = ToolCall(inner["name"], json.dumps(inner["arguments"], ensure_ascii=False))
    return f'```json\n{{"name": {json.dumps(made.name)}, "arguments": {made.arguments}}}\n```'
