"""The small endpoints: models, tokens, health, and what this server does not have."""

import asyncio
from typing import Any

from starlette.requests import Request

from .asks import check_model, require_model
from .body import read_body
from .fields import Fields
from .messages import read_messages
from .place import Place
from .problems import ApiError

MOST_IDS = 2**20


async def models(request: Request) -> dict[str, Any]:
    """GET /v1/models: the one model there is, and each of its adapters."""
    place = Place.of(request)
    return {"object": "list", "data": [_model(place), *(_model(place, name) for name in place.adapters)]}


async def model(request: Request) -> dict[str, Any]:
    """GET /v1/models/{id}. Raises ApiError 404 for any other."""
    place, name = Place.of(request), request.path_params["name"]
    if name in place.adapters:
        return _model(place, name)
    require_model(name, place.settings)
    return _model(place)


async def health(request: Request) -> dict[str, Any]:
    """GET /health: needs no key. Raises ApiError 503 once the server stops."""
    place = Place.of(request)
    if not place.desk.open:
        raise ApiError(503, "the server is stopping", code="shutting_down")
    return {"status": "ok", "model": place.settings.name, "pending": place.desk.pending}


async def tokenize(request: Request) -> dict[str, Any]:
    """POST /tokenize: `prompt` (a text) or `messages` (through the chat template) to token ids."""
    place = Place.of(request)
    given = Fields(await read_body(request, place.settings.max_body))
    check_model(given, place.settings, place.adapters)
    prompt, content, messages = given.text("prompt"), given.text("content"), given.items("messages")
    bos = given.take("add_special_tokens")
    if bos is None:
        bos = given.take("add_special")
    if bos is not None and not isinstance(bos, bool):
        raise given.wrong("add_special_tokens", "must be true or false", bos)
    generate = given.flag("add_generation_prompt", True)
    template_args = {**place.settings.template_args, **given.mapping("chat_template_kwargs")}
    pieces = given.flag("return_token_strs", False)
    given.done()
    if sum((prompt is not None, content is not None, bool(messages))) != 1:
        raise ApiError(400, "give either prompt, a text, or messages", param="prompt")
    tokenizer = place.runtime.tokenizer
    if messages:
        conversation = read_messages(messages)
        rendered = await asyncio.to_thread(place.runtime.render, conversation, generate, template_args=template_args)
        ids = list(rendered.ids)
    else:
        ids = await asyncio.to_thread(tokenizer.encode, prompt if content is None else content, add_bos=bos)
    found = {"tokens": ids, "count": len(ids), "max_model_len": place.runtime.info.context}
    return found | ({"token_strs": [tokenizer.piece(token) for token in ids]} if pieces else {})


async def detokenize(request: Request) -> dict[str, Any]:
    """POST /detokenize: `tokens` (ids) to text, special tokens included."""
    place = Place.of(request)
    given = Fields(await read_body(request, place.settings.max_body))
    check_model(given, place.settings, place.adapters)
    tokens = given.items("tokens")
    given.done()
    if len(tokens) > MOST_IDS or not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ApiError(400, f"tokens must be at most {MOST_IDS} token ids", param="tokens")
    text = await asyncio.to_thread(place.runtime.tokenizer.decode, tokens, skip_special=False)
    return {"prompt": text, "content": text}


async def embeddings(request: Request) -> dict[str, Any]:
    """POST /v1/embeddings: refused, with the reason."""
    place = Place.of(request)
    given = Fields(await read_body(request, place.settings.max_body))
    check_model(given, place.settings, place.adapters)
    raise ApiError(
        400,
        f"{place.settings.name!r} is a model that writes text, it gives no embeddings",
        param="model",
        code="embeddings_unsupported",
    )


def _model(place: Place, adapter: str | None = None) -> dict[str, Any]:
    """The model, or the model with an adapter, whose `parent` it then is."""
    info = place.runtime.info
    return {
        "id": adapter or place.settings.name,
        **({"parent": place.settings.name} if adapter else {}),
        "object": "model",
        "created": place.created,
        "owned_by": "exl-runtime",
        "max_model_len": info.context,
        "meta": {"architecture": info.architecture, "format": info.format, "bits_per_weight": info.bits_per_weight},
    }
