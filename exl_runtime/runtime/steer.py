"""What a caller may ask for beyond length and sampling: guesses, grammars, bans; loose arguments made strict."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ..errors import UsageError
from ..generation.grammar import Grammar
from ..generation.request import Left, Processor, Speculate
from .lora import Given
from .prepare import Prompt


class Steer(TypedDict, total=False):
    """Keyword arguments of `Runtime.generate` and `stream`; what they mean is said at `generation.request.Request`,
    but for template_args, which are variables of the chat template and for messages only."""

    stop_ids: Sequence[int] | None
    speculate: Speculate
    grammar: Grammar | None
    banned_strings: str | Sequence[str] | None
    prefix: str
    heal: bool
    stop_loop: Sequence[int] | None
    processors: "Processor | Sequence[Processor]"
    prompt_logprobs: int
    negative_prompt: "Prompt"
    guidance: float
    lora: "Given"
    priority: int
    keep: int
    left: Left | None
    template_args: Mapping[str, Any] | None


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Request. Raises TypeError for a name that is none of `Steer`, as a function does."""
    unknown = [name for name in options if name not in Steer.__annotations__]
    if unknown:
        raise TypeError(f"there is no argument {unknown[0]!r}; known besides: {', '.join(Steer.__annotations__)}")
    fields = dict(options)
    banned = fields.get("banned_strings")
    if "banned_strings" in fields:
        fields["banned_strings"] = (banned,) if isinstance(banned, str) and banned else tuple(banned or ())
    if "processors" in fields:
        given = fields["processors"]
        fields["processors"] = (given,) if callable(given) else tuple(given or ())
    if "stop_ids" in fields:
        fields["stop_ids"] = _ids(fields["stop_ids"])
    if fields.get("stop_loop") is not None:
        fields["stop_loop"] = tuple(fields["stop_loop"])
    return fields


def _ids(given: Any) -> frozenset[int]:
    ids = () if given is None else (given,) if isinstance(given, int) else given
    if isinstance(ids, str) or any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise UsageError(f"stop_ids is {given!r:.80}", hint="give a list of token ids; `stop` takes texts")
    return frozenset(ids)
