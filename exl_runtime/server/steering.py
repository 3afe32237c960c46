"""Sampling parameters, ends, bans and everything else that steers a reply; where other servers have a name, theirs."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import UsageError
from ..sampling.params import SamplingParams
from .fields import Fields
from .problems import ApiError

MOST_STOPS = 16
MOST_BANNED = 256
MOST_STOP_IDS = 1024
MOST_ADAPTERS = 16
MOST_GUIDANCE = 100
GUIDANCE = 1.5  # where a negative prompt is given and no number
SAMPLING = tuple(entry.name for entry in fields(SamplingParams) if entry.name != "logprobs")


@dataclass(frozen=True, slots=True)
class Leading:
    """Away from what follows another prompt: a text or token ids; of a chat, the system prompt ("": none)."""

    negative: Any
    scale: float


def read_sampling(given: Fields, defaults: SamplingParams) -> SamplingParams:
    """Every sampling parameter of this program by its own name. Raises ApiError naming the one that is wrong."""
    values = {name: value for name in SAMPLING if (value := given.take(name)) is not None}
    if (allowed := given.wholes("allowed_token_ids", 2**20)) and "allowed_tokens" not in values:
        values["allowed_tokens"] = allowed
    if values.get("top_k") == -1:  # how others turn it off
        values["top_k"] = 0
    if isinstance(bias := values.get("logit_bias"), dict):
        try:
            values["logit_bias"] = {int(token): amount for token, amount in bias.items()}
        except ValueError as err:
            raise ApiError(400, "the keys of logit_bias must be token ids", param="logit_bias") from err
    param = next(iter(values)) if len(values) == 1 else None
    try:
        return replace(defaults, **values)
    except UsageError as err:
        named = next((name for name in values if err.problem.startswith(name)), param)
        message = err.problem if err.hint is None else f"{err.problem} ({err.hint})"
        raise ApiError(400, message, param=named) from err


def read_steering(given: Fields) -> dict[str, Any]:
    """Arguments of `Runtime.stream`. Raises ApiError."""
    banned = given.strings("banned_strings", MOST_BANNED) + given.strings("bad_words", MOST_BANNED)
    own, others = given.text("prefix"), given.text("response_prefix")
    return {
        "stop": given.strings("stop", MOST_STOPS),
        "banned_strings": banned,
        "stop_ids": given.wholes("stop_token_ids", MOST_STOP_IDS),
        "stop_loop": _loop(given),
        "prefix": own or others or "",
        "priority": -given.integer("priority", 0),  # a smaller number goes first in this protocol
        "deadline": given.seconds("deadline"),
        **_lora(given),
    }


def read_leading(given: Fields) -> Leading | None:
    """negative_prompt and guidance_scale; None where nothing is to be led away from. Raises ApiError."""
    negative = given.take("negative_prompt")
    own, others = (given.number(name, 0, MOST_GUIDANCE) for name in ("guidance_scale", "cfg_scale"))
    scale = own if own is not None else others
    if scale is None:
        scale = 1.0 if negative is None else GUIDANCE
    return None if scale == 1 else Leading(negative, scale)


def _loop(given: Fields) -> tuple[int, int] | None:
    pair = given.wholes("stop_loop", 2)
    if pair and (len(pair) != 2 or pair[0] < 1 or pair[1] < 2):
        raise given.wrong("stop_loop", "must be [longest, times], say [32, 4]", list(pair))
    return (pair[0], pair[1]) if pair else None


def _lora(given: Fields) -> dict[str, Any]:
    """The adapters of one request: a name, several, or {name: weight}; left out, those of the server."""
    value = given.take("lora")
    if value is None:
        return {}
    names = [value] if isinstance(value, str) else value
    numbers = isinstance(names, Mapping) and all(
        isinstance(weight, int | float) and not isinstance(weight, bool) for weight in names.values()
    )
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not (numbers or texts) or len(names) > MOST_ADAPTERS:
        raise given.wrong("lora", "must be the name of an adapter, a list of names, or {name: weight}", value)
    return {"lora": names}
