"""POST /v1/completions: plain texts or token ids to go on with."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from ..generation.request import Result, TokenLogprob
from ..generation.stream import Finished, Text
from . import shapes
from .asks import CompletionAsk, led_away, read_completion
from .body import read_body
from .desk import Batch
from .place import Place, noted
from .stream import PATIENCE, EventStream, watched


async def completions(request: Request) -> Any:
    """Go on with one or several prompts; choice i belongs to prompt i // n. Raises ApiError and ExlError."""
    place = Place.of(request)
    ask = read_completion(await read_body(request, place.settings.max_body), place.settings, place.adapters)
    orders = [await asyncio.to_thread(_order, place, ask, prompt) for prompt in ask.prompts]
    orders = [ask.order(prompt, sample) | options for prompt, options in orders for sample in range(ask.best_of)]
    batch = place.desk.start(orders)
    if ask.stream:
        await batch.begun(PATIENCE)
        return EventStream(request, batch, _chunks(place, ask, batch, request), place.report)
    return await _whole(place, ask, batch, request)


def _order(place: Place, ask: CompletionAsk, prompt: Any) -> tuple[Any, dict[str, Any]]:
    """A prompt, and what its replies need beside what the request says."""
    options: dict[str, Any] = {} if ask.skip_special else {"skip_special": False}
    if ask.echo and ask.logprobs is not None:
        options["prompt_logprobs"] = max(1, ask.logprobs, ask.prompt_logprobs or 0)
    if ask.best_of > ask.n and ask.logprobs is None:
        options["logprobs"] = 1
    if ask.leading is not None:
        runtime = place.runtime
        encode = runtime.tokenizer.encode
        prompt, negative = (
            encode(text, add_bos=None) if isinstance(text, str) else text for text in (prompt, ask.leading.negative)
        )
        options |= led_away(ask, negative, len(prompt), runtime.info.context)
    return prompt, options


def _opening(place: Place, ask: CompletionAsk, index: int) -> str:
    """What the text of choice `index` begins with: with `echo`, its prompt."""
    if not ask.echo:
        return ""
    prompt = ask.prompts[index // ask.n]
    return prompt if isinstance(prompt, str) else place.runtime.tokenizer.decode(prompt)


async def _whole(place: Place, ask: CompletionAsk, batch: Batch, request: Request) -> dict[str, Any]:
    count = len(batch.jobs)
    results: list[Result | None] = [None] * count
    async with watched(batch, request.receive):
        async for item in batch.events():
            if item is not None and isinstance(item[1], Finished):
                results[item[0]] = item[1].result
    choices = []
    ended = [result for result in results if result is not None]
    groups = [ended[start : start + ask.best_of] for start in range(0, len(ended), ask.best_of)]
    given = [
        result for group in groups for result in (group if ask.best_of == ask.n else shapes.likeliest(group, ask.n))
    ]
    for index, result in enumerate(given):
        choices.append(
            {
                "index": index,
                "text": _opening(place, ask, index) + result.text,
                "logprobs": _scores(place, ask, index, result),
                "finish_reason": shapes.finish_reason(result, 0),
                **_prompt_scores(place, ask, result),
            }
        )
    counts = shapes.usage(ended, ask.best_of, 0)
    noted(request, counts)
    made = shapes.head("text_completion", ask.model, "cmpl")
    return {**made, "choices": choices, "usage": counts, **shapes.truncated(ended)}


async def _chunks(
    place: Place, ask: CompletionAsk, batch: Batch, request: Request
) -> AsyncIterator[dict[str, Any] | None]:
    made = shapes.head("text_completion", ask.model, "cmpl")
    if ask.include_usage:
        made["usage"] = None
    sent = [0] * len(batch.jobs)  # characters
    results: dict[int, Result] = {}

    def chunk(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {**made, "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]}

    if ask.echo:
        for index in range(len(batch.jobs)):
            yield chunk(index, _opening(place, ask, index), None, None)
    async for item in batch.events(place.settings.keep_alive):
        if item is None:
            yield None
            continue
        index, event = item
        if isinstance(event, Text):
            yield chunk(index, event.text, _logprobs(place, ask, event.logprobs or (), sent[index]), None)
            sent[index] += len(event.text)
        elif isinstance(event, Finished):
            results[index] = event.result
            yield chunk(index, "", None, shapes.finish_reason(event.result, 0))
    ended = [results[index] for index in sorted(results)]
    counts = shapes.usage(ended, ask.n, 0)
    noted(request, counts)
    if ask.include_usage:
        yield {**made, "choices": [], "usage": counts, **shapes.truncated(ended)}


def _scores(place: Place, ask: CompletionAsk, index: int, result: Result) -> Any:
    """logprobs of a whole reply; with `echo`, of its prompt too."""
    if not (result.prompt_logprobs and ask.echo and ask.logprobs is not None):
        return _logprobs(place, ask, result.logprobs or (), 0)
    prompt, tokenizer = ask.prompts[index // ask.n], place.runtime.tokenizer
    first = (tokenizer.encode(prompt, add_bos=None) if isinstance(prompt, str) else prompt)[0]
    entries = (*result.prompt_logprobs, *(result.logprobs or ()))
    return shapes.text_logprobs(tokenizer, entries, ask.logprobs or 0, 0, first)


def _prompt_scores(place: Place, ask: CompletionAsk, result: Result) -> dict[str, Any]:
    """The field that vLLM has for it."""
    if ask.prompt_logprobs is None:
        return {}
    scores = shapes.prompt_logprobs(place.runtime.tokenizer, result.prompt_logprobs, ask.prompt_logprobs)
    return {"prompt_logprobs": scores}


def _logprobs(place: Place, ask: CompletionAsk, entries: "tuple[TokenLogprob, ...]", offset: int) -> Any:
    if ask.logprobs is None:
        return None
    return shapes.text_logprobs(place.runtime.tokenizer, entries, ask.logprobs, offset)
