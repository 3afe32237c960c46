"""What a request does to the logits before its sampler sees them: processors, then grammar, beginning and bans.

One object per request, with the state of all of them; tokens can be taken back.
"""

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .matching import Matcher
from .request import Processor
from .vocabulary import Vocabulary


class Opening:
    """A text the reply has to begin with, cut into tokens in any way; the last of them may go on behind it."""

    def __init__(self, text: bytes, vocabulary: Vocabulary) -> None:
        self._text = text
        self._vocabulary = vocabulary
        self._places = [0]  # bytes written after each token of the reply

    @property
    def left(self) -> bytes:
        """What is still to come."""
        return self._text[self._places[-1] :]

    def allowed(self) -> np.ndarray:
        """Ids, int64 (n,): what may come next."""
        return self._vocabulary.towards(self.left)

    def accept(self, token: int) -> None:
        self._places.append(self._places[-1] + len(self._vocabulary.spelled(token)))

    def back(self, count: int) -> None:
        del self._places[len(self._places) - count :]


class Steering:
    """`banned` holds, by index in the reply, the ids that led to a banned string from there."""

    def __init__(
        self,
        *,
        matcher: Matcher | None = None,
        opening: Opening | None = None,
        processors: Many[Processor] = (),
    ) -> None:
        self.matcher = matcher
        self.opening = opening
        self.processors = tuple(processors)
        self.banned: dict[int, set[int]] = {}

    @property
    def finished(self) -> bool:
        """True when the grammar allows nothing more."""
        return self.matcher is not None and self.matcher.finished

    def shape(self, logits: Tensor, tokens: list[int], index: int) -> Tensor:
        """The logits, float32 (vocab,), for reply token `index` after `tokens`; -inf where a token may not come.

        Raises UsageError when nothing may come, or when a processor returns something else than logits.
        """
        banned = self.banned.get(index)
        if not (self.processors or self.matcher or banned or (self.opening and self.opening.left)):
            return logits
        shaped = logits.clone()
        for processor in self.processors:
            shaped = _processed(processor, tokens, shaped)
        if self.matcher is not None:
            shaped[torch.from_numpy(~self.matcher.allowed())] = -torch.inf
        if self.opening is not None and self.opening.left:
            kept = torch.full_like(shaped, -torch.inf)
            ids = torch.from_numpy(self.opening.allowed())
            kept[ids] = shaped[ids]
            shaped = kept
        if banned:
            shaped[list(banned)] = -torch.inf
        if not bool((shaped > -torch.inf).any()):
            raise UsageError(
                f"no token may follow after {index} of the reply: {', '.join(self._at_work(index))} exclude all",
                hint="loosen one of them; a text that is both required and banned cannot be written",
            )
        return shaped

    def accept(self, token: int) -> None:
        """`token` was drawn."""
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.opening is not None:
            self.opening.accept(token)

    def back(self, index: int, count: int, token: int) -> None:
        """The last `count` tokens are taken back, down to `index`; `token` shall not come there again."""
        if self.matcher is not None:
            self.matcher.back(count)
        if self.opening is not None:
            self.opening.back(count)
        self.banned = {place: ids for place, ids in self.banned.items() if place <= index}
        self.banned.setdefault(index, set()).add(token)

    def fitting(self, guess: list[int]) -> list[int]:
        """The beginning of a guess that the grammar lets through."""
        return guess if self.matcher is None or not guess else guess[: self.matcher.fitting(guess)]

    def forced(self) -> list[int]:
        """Tokens the grammar leaves no choice about: sure guesses."""
        return [] if self.matcher is None else self.matcher.forced()

    def _at_work(self, index: int) -> list[str]:
        parts = {
            "logit processors": self.processors,
            "the grammar": self.matcher,
            "the text to begin with": self.opening is not None and self.opening.left,
            "banned strings": self.banned.get(index),
        }
        return [name for name, there in parts.items() if there]


def _processed(processor: Processor, tokens: list[int], logits: Tensor) -> Tensor:
    name = getattr(processor, "__name__", type(processor).__name__)
    changed = processor(list(tokens), logits)
    if not isinstance(changed, Tensor) or changed.shape != logits.shape:
        what = f"shape {tuple(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise UsageError(f"the logit processor {name} gave {what}, wanted logits of shape {tuple(logits.shape)}")
    changed = changed.to("cpu", torch.float32)
    if bool(torch.isnan(changed).any()) or bool((changed == torch.inf).any()):
        raise UsageError(f"the logit processor {name} gave NaN or infinity", hint="-inf alone is fine: it removes")
    return changed
