"""The objects of the OpenAI protocol, from results and events. Pure functions; what they return is JSON."""

import math
import re
import secrets
import string
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import TokenizerError
from ..generation.request import Result, TokenLogprob
from ..tokenizer.decoding import token_bytes
from ..tokenizer.tool_calls import ToolCall

IMPOSSIBLE = -9999.0  # what the protocol writes for the log-probability of what cannot be
FINISH = {"eos": "stop", "stop": "stop", "loop": "stop"}  # anything else cut the reply short
_ALPHABET = string.ascii_letters + string.digits
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def head(kind: str, model: str, prefix: str) -> dict[str, Any]:
    """What every object of one reply begins with; `kind` is the name of the object."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def finish_reason(result: Result, calls: int) -> str:
    """ "stop", "length" or "tool_calls"."""
    return "tool_calls" if calls else FINISH.get(result.stop_reason, "length")


def tool_call(call: ToolCall) -> dict[str, Any]:
    """A call with a fresh id: nine letters and digits, which every chat template accepts."""
    made = "".join(secrets.choice(_ALPHABET) for _ in range(9))
    return {"id": made, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def likeliest(results: Sequence[Result], n: int) -> list[Result]:
    """The `n` results with the highest mean log-probability of a token, the best first."""

    def mean(result: Result) -> float:
        values = [entry.logprob for entry in result.logprobs or ()]
        return sum(values) / len(values) if values else -math.inf

    return sorted(results, key=mean, reverse=True)[:n]


def usage(results: Sequence[Result], n: int, thoughts: int) -> dict[str, Any]:
    """Token counts of a request: `n` results per prompt. A prompt counts once however many replies it has."""
    prompts = [results[i : i + n] for i in range(0, len(results), n)]
    prompt = sum(samples[0].prompt_tokens for samples in prompts)
    generated = sum(result.generated_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(min(result.reused_tokens for result in samples) for samples in prompts)
        },
        "completion_tokens_details": {"reasoning_tokens": thoughts},
    }


def truncated(results: Iterable[Result]) -> dict[str, Any]:
    """What left the context, as a field of our own; empty when nothing did."""
    dropped = [(result.dropped_tokens, result.dropped_turns) for result in results]
    tokens, turns = (max((pair[i] for pair in dropped), default=0) for i in (0, 1))
    return {"truncated": {"tokens": tokens, "turns": turns}} if tokens or turns else {}


def chat_logprobs(tokenizer: Any, entries: Iterable[TokenLogprob], top: int) -> dict[str, Any]:
    """logprobs of a chat choice: one entry per token, each with the `top` best."""
    content = []
    for entry in entries:
        best = [_token(tokenizer, token, value) for token, value in entry.top[:top]]
        content.append({**_token(tokenizer, entry.id, entry.logprob), "top_logprobs": best})
    return {"content": content, "refusal": None}


def text_logprobs(
    tokenizer: Any, entries: Sequence[TokenLogprob | None], top: int, offset: int, first: int | None = None
) -> dict[str, Any]:
    """logprobs of a plain completion; `offset`: characters of the reply before the first entry.

    None stands for the first token of a scored prompt, id `first`, before which there is nothing to judge it by.
    """
    ids = [first if entry is None else entry.id for entry in entries]
    texts = ["" if token is None else token_text(tokenizer, token) for token in ids]
    offsets = []
    for token, text in zip(ids, texts, strict=True):
        offsets.append(offset)
        offset += 0 if token in tokenizer.special_ids else len(text)  # they are not in the text
    return {
        "tokens": texts,
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [
            None if entry is None else {token_text(tokenizer, i): _finite(value) for i, value in entry.top[:top]}
            for entry in entries
        ],
        "text_offset": offsets,
    }


def prompt_logprobs(tokenizer: Any, entries: Sequence[TokenLogprob | None] | None, top: int) -> list[Any]:
    """How likely every token of a prompt was, as vLLM writes it: for each an object of token ids, among them its own.

    The first is None: before it nothing stands. `rank` is None for a token that is not among the `top` best.
    """
    found: list[Any] = []
    for entry in entries or ():
        if entry is None:
            found.append(None)
            continue
        ranked = {id: (value, rank) for rank, (id, value) in enumerate(entry.top[: max(1, top)], 1)}
        own = ranked.get(entry.id, (entry.logprob, None))
        chosen = {entry.id: own} | (ranked if top else {})
        found.append(
            {
                str(id): {"logprob": _finite(value), "rank": rank, "decoded_token": token_text(tokenizer, id)}
                for id, (value, rank) in chosen.items()
            }
        )
    return found


def token_text(tokenizer: Any, token: int) -> str:
    """What a token shows alone: special tokens by their name, parts of a character as U+FFFD."""
    try:
        return tokenizer.piece(token) if token in tokenizer.special_ids else tokenizer.text_of(token)
    except TokenizerError:  # a padding row of the embedding
        return ""


def _token(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    spelled = text.encode()
    if "\ufffd" in text:
        match = _BYTE.fullmatch(piece := tokenizer.piece(token))
        spelled = bytes([int(match[1], 16)]) if match else token_bytes(piece)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(spelled)}


def _finite(value: float) -> float:
    return max(value, IMPOSSIBLE)
