"""Messages and tools as plain JSON-like copies, which is all a template gets to see."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TemplateError

_MAX_DEPTH = 48
_REASONING = ("reasoning_content", "thinking", "reasoning")


def plain_value(value: Any, where: str, depth: int = 0) -> Any:
    """A deep copy of `value` in str, int, float, bool, None, list, tuple, dict. Raises TemplateError for others."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > _MAX_DEPTH:
        raise TemplateError(f"{where}: values are nested more than {_MAX_DEPTH} deep")
    for kind in (str, int, float):  # a subclass could carry methods into the template
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain_value(k, where, depth + 1): plain_value(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(plain_value(item, where, depth + 1) for item in value)
            if type(value) in (list, tuple)
            else [plain_value(item, where, depth + 1) for item in value]
        )
    raise TemplateError(f"{where}: a template can take texts, numbers, lists and mappings, not {type(value).__name__}")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages as templates expect them: keys with None left out, the reasoning of a turn under
    each of its customary names. Raises TemplateError for anything that is not a list of mappings."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(f"messages must be a list of mappings, not {type(messages).__name__}")
    if not messages:
        raise TemplateError("the conversation is empty", hint="give at least one message")
    copies = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(f"message {index} must be a mapping with role and content, not {message!r:.60}")
        copy = plain_value({key: value for key, value in message.items() if value is not None}, f"message {index}")
        reasoning = next((copy[key] for key in _REASONING if key in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        copies.append(copy)
    return copies


def fold_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation without system messages at its beginning: their text opens the first user message."""
    rest = [dict(message) for message in messages]
    texts = []
    while rest and rest[0].get("role") == "system":
        texts.append(_text(rest.pop(0).get("content")))
    system = "\n\n".join(text for text in texts if text)
    if not system:
        return rest
    if not rest or rest[0].get("role") != "user":
        return [{"role": "user", "content": system}, *rest]
    content = rest[0].get("content")
    if isinstance(content, (list, tuple)):
        rest[0]["content"] = [{"type": "text", "text": system + "\n\n"}, *content]
    else:
        rest[0]["content"] = f"{system}\n\n{content}" if content else system
    return rest


def _text(content: Any) -> str:
    if isinstance(content, (list, tuple)):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)
