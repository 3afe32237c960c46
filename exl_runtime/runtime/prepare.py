"""From what a caller hands in (text, token ids, messages) to the token ids of one prompt. Knows no model."""

import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

from ..cache.window import prompt_limit, turns_to_drop
from ..errors import PromptTooLong, TemplateError, UsageError
from ..generation.request import Left
from ..tokenizer.past import NOTHING, past_of
from ..tokenizer.template import ChatTemplate
from ..tokenizer.template_args import check_name, unmentioned_line
from ..tokenizer.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"
MOST_TOLD = 100
MESSAGE_HINT = 'a message is {"role": "user", "content": "..."}; roles are system, user, assistant and tool'

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as the model sees it."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The ids of a prompt, and how many of the oldest turns did not fit. `head`: first tokens, before any turn; `left`:
    what to know of the turns that are not in it."""

    ids: tuple[int, ...]
    head: int = 0
    dropped_turns: int = 0
    dropped_tokens: int = 0
    left: Left | None = None


def is_batch(prompt: Any) -> bool:
    """True for a list of prompts, as opposed to one prompt that is a list (of ids, or of messages)."""
    if isinstance(prompt, str | bytes | Mapping) or not isinstance(prompt, Sequence) or not len(prompt):
        return False
    return isinstance(prompt[0], str) or (isinstance(prompt[0], Sequence) and not isinstance(prompt[0], bytes))


def is_conversation(prompt: Any) -> bool:
    """True for messages, as opposed to text or token ids."""
    if isinstance(prompt, str | bytes | Mapping) or not isinstance(prompt, Sequence):
        return False
    return bool(len(prompt)) and isinstance(prompt[0], Mapping)


class Preparer:
    """Renders and encodes for one model; every error names what is wrong with the prompt.

    `knows(past)`: whether something is known of conversations that lost exactly those turns
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        vocab_size: int,
        context: int,
        knows: Callable[[bytes], bool] = lambda past: False,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.vocab_size = vocab_size
        self.context = context
        self._knows = knows
        self._told: set[str] = set()  # template variables without effect

    def prepare(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None,
        overflow: str,
        past: bytes = NOTHING,
        template_args: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """Token ids of `prompt`. Text gets the BOS token when the model wants one, rendered messages never a second.

        With overflow "drop", whole turns leave a conversation that is too long, oldest first; the system message and
        the last user turn stay. Other overflow policies act on tokens and are the generator's business. `past`: of
        turns that had left before, and are not in `prompt` any more. `template_args`: for messages only.
        """
        if template_args and not is_conversation(prompt):
            raise UsageError(
                "template_args are for messages, this prompt is not rendered", hint='give [{"role": "user", ...}]'
            )
        if isinstance(prompt, str):
            return self._checked(self.tokenizer.encode(prompt, add_bos=None))
        if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence):
            raise UsageError(f"a prompt is text, token ids or messages, not {type(prompt).__name__}")
        if not is_conversation(prompt):
            return self._checked(prompt)
        self._tell(template_args or ())
        messages = check_messages(prompt)
        if overflow == "drop":
            return self._fitting(messages, max_tokens, past, template_args)
        prepared = self._checked(self.render(messages, template_args=template_args).ids)
        if overflow != "window":
            return prepared
        return replace(prepared, head=self.head(messages, prepared.ids, template_args=template_args))

    def beside(self, prompt: Prompt, template_args: Mapping[str, Any] | None) -> tuple[int, ...]:
        """Token ids of a further prompt of a request; it may be no conversation though the first one is."""
        args = template_args if is_conversation(prompt) else None
        return self.prepare(prompt, max_tokens=None, overflow="error", template_args=args).ids

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Apply the chat template, with `template_args` as variables of it. Raises TemplateError when the model has
        none, or when it refuses; UsageError for a name that is not the caller's to set."""
        if self.template is None:
            raise TemplateError(
                "this model has no chat template",
                hint="complete raw text instead (`exl run --raw`), or give a template file with --template",
            )
        for name in template_args or ():
            check_name(name)
        messages = check_messages(messages)
        if messages[0]["role"] == "system" and not self.template.supports_system:
            messages = ChatTemplate.fold_system(messages)
        text, ids = self.template.encode(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, template_args=template_args
        )
        return Rendered(text=text, ids=tuple(ids))

    def _tell(self, names: Iterable[str]) -> None:
        """Log once of every variable that the template never reads."""
        new = [] if self.template is None else [n for n in self.template.unmentioned(names) if n not in self._told]
        if new and len(self._told) < MOST_TOLD:
            self._told.update(new)
            log.warning("%s", unmentioned_line(new))

    def _checked(self, ids: Sequence[int]) -> Prepared:
        if not len(ids):
            raise UsageError("the prompt is empty", hint="give at least one token of text")
        return Prepared(ids=tuple(self._checked_id(token) for token in ids))

    def _checked_id(self, token: object) -> int:
        """A Python int; whole numbers of other libraries (numpy, 0-d tensors) are ids too."""
        try:
            number = -1 if isinstance(token, bool) else operator.index(token)
        except TypeError:
            number = -1
        if not 0 <= number < self.vocab_size:
            raise UsageError(f"{token!r:.60} is not a token id of this model (0 to {self.vocab_size - 1})")
        return number

    def head(
        self,
        messages: Sequence[Message],
        ids: Sequence[int],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> int:
        """Tokens before the first turn: what a conversation that begins like this and says something else shares.
        0: it begins with a turn, and no tools stand before it."""
        starts = turn_starts(messages)
        if not starts or not (starts[0] or tools):
            return 0
        start = [*messages[: starts[0]], {"role": "user", "content": "?"}]
        other = self.render(start, tools=tools, template_args=template_args).ids
        return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))

    def _fitting(
        self,
        messages: list[dict[str, Any]],
        max_tokens: int | None,
        past: bytes,
        template_args: Mapping[str, Any] | None,
    ) -> Prepared:
        starts = turn_starts(messages)
        head, last = messages[: starts[0]] if starts else messages, max(0, len(starts) - 1)
        rendered: dict[int, tuple[int, ...]] = {}

        def without(turns: int) -> tuple[int, ...]:
            if turns not in rendered:
                kept = head + messages[starts[turns] :] if starts else messages
                rendered[turns] = self.render(kept, template_args=template_args).ids
            return rendered[turns]

        limit = prompt_limit(self.context, max_tokens)
        if len(without(0)) <= limit:
            ids = self._checked(without(0)).ids
            return Prepared(ids=ids, left=Left(past=past) if past else None)
        pasts = [past]
        for first, following in pairwise(starts):
            pasts.append(past_of(messages[first:following], pasts[-1]))
        # A client that sends everything again shall lose the turns it has lost, and no further one each time.
        known = [turns for turns in range(1, last + 1) if self._knows(pasts[turns])]
        before = known[-1] if known else 0
        dropped = next((turns for turns in known if len(without(turns)) <= limit), None)
        whole: tuple[int, ...] = ()
        if dropped is None:
            more = turns_to_drop(lambda turns: len(without(before + turns)), last - before, limit=limit)
            if more is None:
                raise PromptTooLong(
                    f"the last message alone is {len(without(last))} tokens; of the {self.context} "
                    f"the context holds, {limit} are for the prompt",
                    hint="shorten it, or open the model with a larger --context",
                )
            dropped, whole = before + more, self._checked(without(before)).ids
        ids = self._checked(without(dropped)).ids
        left = Left(past=pasts[dropped], whole=whole, before=pasts[before] if whole else NOTHING)
        tokens = len(without(0)) - len(ids)
        return Prepared(ids=ids, dropped_turns=dropped, dropped_tokens=tokens, left=left)


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain dicts; what they may contain beyond a role is the template's affair. Raises UsageError."""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f"message {number} is not a mapping with a role", hint=MESSAGE_HINT)
        if "content" not in message and "tool_calls" not in message:
            raise UsageError(f"message {number} has no content", hint=MESSAGE_HINT)
    if not messages:
        raise UsageError("the conversation has no messages", hint=MESSAGE_HINT)
    return [dict(message) for message in messages]


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where the turns begin: at every message of the user; what stands before the first one belongs to none."""
    return [i for i, message in enumerate(messages) if message["role"] == "user"]
