"""POST /v1/chat/completions."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ..generation.request import Result, TokenLogprob
from ..generation.stream import Finished, Text
from ..tokenizer.tool_calls import ToolCall
from . import shapes
from .asks import ChatAsk, read_chat
from .body import read_body
from .choice import Choice, Delta, Form
from .desk import Batch
from .messages import plain_conversation
from .place import Place, noted
from .problems import ApiError
from .stream import PATIENCE, EventStream, watched


@dataclass(frozen=True, slots=True)
class Plan:
    """A chat request, ready to run: the prompt (token ids, or the messages), how to read the replies, and how many
    first tokens stay when old ones leave."""

    prompt: Any
    form: Form
    keep: int = 0


class Reply:
    """One choice as it grows."""

    def __init__(self, form: Form) -> None:
        self.choice = Choice(form)
        self.logprobs: list[TokenLogprob] = []  # not yet sent
        self.thoughts = 0  # tokens
        self.result: Result | None = None

    def take(self, event: Any) -> list[Delta]:
        """What an event adds."""
        if isinstance(event, Text):
            self.logprobs += event.logprobs or ()
            found = self.choice.push(event.text)
            if self.choice.thinking or any(not isinstance(d, ToolCall) and d[0] == "reasoning" for d in found):
                self.thoughts += len(event.ids)
            return found
        if isinstance(event, Finished):
            self.result = event.result
            return self.choice.finish()
        return []


async def chat(request: Request) -> Any:
    """Answer a conversation. Raises ApiError and ExlError."""
    place = Place.of(request)
    ask = read_chat(await read_body(request, place.settings.max_body), place.settings)
    place.desk.admit(ask.n)
    plan = await asyncio.to_thread(make_plan, place.runtime, ask)
    options: dict[str, Any] = {} if plan.form.skip_special else {"skip_special": False}
    if plan.keep:
        options["keep"] = plan.keep
    batch = place.desk.start([ask.order(plan.prompt, sample) | options for sample in range(ask.n)])
    replies = [Reply(plan.form) for _ in range(ask.n)]
    if ask.stream:
        await batch.begun(PATIENCE)
        return EventStream(request, batch, _chunks(place, ask, batch, replies, request), place.report)
    return await _whole(place, ask, batch, replies, request)


def make_plan(runtime: Any, ask: ChatAsk) -> Plan:
    """Render the conversation. Raises TemplateError when the model has no chat template, or when it refuses."""
    messages, tools = ask.messages, None
    if runtime.template is not None and not runtime.template.supports_tools:
        messages = plain_conversation(messages, ask.tools)
    elif ask.tools:
        tools = [tool.given for tool in ask.tools]
    rendered = runtime.render(messages, tools=tools, extra=ask.template_values or None)
    form = Form.of(
        runtime,
        rendered.text,
        schemas={tool.name: tool.parameters for tool in ask.tools},
        split=ask.split_reasoning,
        one_call=ask.forced or not ask.parallel_calls,
        constrained=ask.grammar is not None,
    )
    if ask.overflow == "window":
        extra = ask.template_values or None
        return Plan(list(rendered.ids), form, runtime.head(messages, rendered.ids, tools=tools, extra=extra))
    if ask.overflow != "drop":
        return Plan(list(rendered.ids), form)
    if tools or ask.template_values:
        problem = 'overflow "drop" cannot be combined with tools or template variables; use "window"'
        raise ApiError(400, problem, param="overflow")
    return Plan(messages, form)


async def _whole(place: Place, ask: ChatAsk, batch: Batch, replies: list[Reply], request: Request) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": None} for _ in replies]
    async with watched(batch, request.receive):
        async for item in batch.events():
            if item is not None:
                for delta in replies[item[0]].take(item[1]):
                    _add(messages[item[0]], delta)
    choices = []
    for index, (reply, message) in enumerate(zip(replies, messages, strict=True)):
        if message["content"] is None and not reply.choice.calls:
            message["content"] = ""
        choices.append(
            {"index": index, "message": message, "logprobs": _logprobs(place, ask, reply), "finish_reason": _end(reply)}
        )
    results = [reply.result for reply in replies if reply.result is not None]
    counts = shapes.usage(results, ask.n, sum(reply.thoughts for reply in replies))
    noted(request, counts)
    made = shapes.head("chat.completion", place.settings.name, "chatcmpl")
    return {**made, "choices": choices, "usage": counts, **shapes.truncated(results)}


async def _chunks(
    place: Place, ask: ChatAsk, batch: Batch, replies: list[Reply], request: Request
) -> AsyncIterator[dict[str, Any] | None]:
    made = shapes.head("chat.completion.chunk", place.settings.name, "chatcmpl")
    if ask.include_usage:
        made["usage"] = None

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = _logprobs(place, ask, replies[index]) if delta or reason else None
        return {**made, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    for index in range(ask.n):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for item in batch.events(place.settings.keep_alive):
        if item is None:
            yield None
            continue
        index, event = item
        reply = replies[index]
        before = reply.choice.calls
        for delta in reply.take(event):
            if isinstance(delta, ToolCall):
                yield chunk(index, {"tool_calls": [{"index": before, **shapes.tool_call(delta)}]})
                before += 1
            else:
                yield chunk(index, {"reasoning_content" if delta[0] == "reasoning" else "content": delta[1]})
        if reply.result is not None:
            yield chunk(index, {}, _end(reply))
    results = [reply.result for reply in replies if reply.result is not None]
    counts = shapes.usage(results, ask.n, sum(reply.thoughts for reply in replies))
    noted(request, counts)
    if ask.include_usage:
        yield {**made, "choices": [], "usage": counts, **shapes.truncated(results)}


def _add(message: dict[str, Any], delta: Delta) -> None:
    if isinstance(delta, ToolCall):
        message.setdefault("tool_calls", []).append(shapes.tool_call(delta))
    else:
        name = "reasoning_content" if delta[0] == "reasoning" else "content"
        message[name] = (message.get(name) or "") + delta[1]


def _logprobs(place: Place, ask: ChatAsk, reply: Reply) -> dict[str, Any] | None:
    """Those not yet sent; None when the request wants none."""
    if ask.logprobs is None:
        return None
    entries, reply.logprobs = reply.logprobs, []
    return shapes.chat_logprobs(place.runtime.tokenizer, entries, ask.logprobs)


def _end(reply: Reply) -> str | None:
    return None if reply.result is None else shapes.finish_reason(reply.result, reply.choice.calls)
