"""POST /v1/chat/completions."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ..generation.request import Result, TokenLogprob
from ..generation.stream import Finished, Text
from ..tokenizer.tool_calls import ToolCall
from . import shapes
from .asks import ChatAsk, led_away, read_chat
from .body import read_body
from .choice import Choice, Delta, Form
from .desk import Batch
from .messages import Tool, plain_conversation
from .place import Place, noted
from .problems import ApiError
from .stream import PATIENCE, EventStream, watched


@dataclass(frozen=True, slots=True)
class Plan:
    """A chat request, ready to run: the prompt (token ids, or the messages), arguments of `Runtime.stream` beside those
    of the request, and how to read the replies."""

    prompt: Any
    options: Mapping[str, Any]
    form: Form


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
    ask = read_chat(await read_body(request, place.settings.max_body), place.settings, place.adapters)
    place.desk.admit(ask.n)
    plan = await asyncio.to_thread(make_plan, place.runtime, ask)
    batch = place.desk.start([ask.order(plan.prompt, sample) | plan.options for sample in range(ask.n)])
    replies = [Reply(plan.form) for _ in range(ask.n)]
    if ask.stream:
        await batch.begun(PATIENCE)
        return EventStream(request, batch, _chunks(place, ask, batch, replies, request), place.report)
    return await _whole(place, ask, batch, replies, request)


def make_plan(runtime: Any, ask: ChatAsk) -> Plan:
    """Render the conversation. Raises TemplateError when the model has no chat template, or when it refuses."""
    messages, tools = _for_template(runtime, ask.messages, ask.tools)
    text, ids = _rendered(runtime, ask, messages, tools)
    form = Form.of(
        runtime,
        text,
        schemas={tool.name: tool.parameters for tool in ask.tools},
        split=ask.split_reasoning,
        one_call=ask.forced or not ask.parallel_calls,
        constrained=ask.grammar is not None or ask.continues,  # neither begins with thoughts
    )
    options: dict[str, Any] = {} if form.skip_special else {"skip_special": False}
    if ask.leading is not None:
        other = [message for message in ask.messages if message["role"] != "system"]
        if ask.leading.negative:
            other.insert(0, {"role": "system", "content": ask.leading.negative})
        negative = _rendered(runtime, ask, *_for_template(runtime, other, ask.tools))[1]
        if negative != ids:
            options |= led_away(ask, negative, len(ids), runtime.info.context)
    if ask.overflow == "window":  # what stands before the first turn stays
        options["keep"] = runtime.head(messages, ids, tools=tools, template_args=ask.template_args)
    if ask.overflow != "drop":
        return Plan(ids, options, form)
    if tools or ask.continues or not ask.generates:
        problem = 'overflow "drop" cannot be combined with tools or an open reply; use "window"'
        raise ApiError(400, problem, param="overflow")
    silent = runtime.template.unmentioned(ask.template_args)  # clients set for every model what few of them know
    if read := {name: value for name, value in ask.template_args.items() if name not in silent}:
        options["template_args"] = read
    return Plan(messages, options, form)


def _for_template(
    runtime: Any, messages: list[dict[str, Any]], tools: Sequence[Tool]
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Conversation and tools as the template takes them."""
    if runtime.template is not None and not runtime.template.supports_tools:
        return plain_conversation(messages, tools), None
    return messages, [tool.given for tool in tools] or None


def _rendered(
    runtime: Any, ask: ChatAsk, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[str, list[int]]:
    """Text and tokens of the prompt. The beginning of a reply is text that no template has closed."""
    begun = messages[-1]["content"] if ask.continues else ""
    rendered = runtime.render(
        messages[:-1] if ask.continues else messages,
        ask.generates or ask.continues,
        tools=tools,
        template_args=ask.template_args,
    )
    more = runtime.tokenizer.encode(begun, parse_special=False) if begun else []
    return rendered.text + begun, [*rendered.ids, *more]


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
    made = shapes.head("chat.completion", ask.model, "chatcmpl")
    scored = {} if ask.prompt_logprobs is None else {"prompt_logprobs": _scored(place, ask, results)}
    return {**made, "choices": choices, "usage": counts, **scored, **shapes.truncated(results)}


def _scored(place: Place, ask: ChatAsk, results: list[Result]) -> Any:
    return shapes.prompt_logprobs(place.runtime.tokenizer, results[0].prompt_logprobs, ask.prompt_logprobs or 0)


async def _chunks(
    place: Place, ask: ChatAsk, batch: Batch, replies: list[Reply], request: Request
) -> AsyncIterator[dict[str, Any] | None]:
    made = shapes.head("chat.completion.chunk", ask.model, "chatcmpl")
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
