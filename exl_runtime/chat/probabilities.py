"""How likely every token of a reply was to the model, and what it would have said instead. Computed afterwards.

The prompt is run once more, without the cache, so any reply can be looked at: one just made, an old one, an edited one.
Probabilities are the model's own, before temperature, penalties and cuts.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..generation.request import TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime import Runtime


def reply_logprobs(runtime: "Runtime", prompt: Sequence[int], reply: Sequence[int], top: int) -> list[TokenLogprob]:
    """Of every token of `reply` after the tokens `prompt`; with the `top` most likely ones in its place.

    Raises PromptTooLong when both together do not fit the context.
    """
    ids = [*prompt, *reply]
    found: list[TokenLogprob] = []

    def visit(position: int, rows: "Tensor") -> None:
        scores = rows.log_softmax(dim=-1)
        for place, row in enumerate(scores, start=position + 1):
            if place < len(ids):
                best = row.topk(min(top, len(row)))
                pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
                found.append(TokenLogprob(ids[place], float(row[ids[place]]), pairs))

    if reply:
        runtime.each_logits(ids, visit, first=len(prompt) - 1)
    return found


def perplexity(tokens: Sequence[TokenLogprob]) -> float:
    """exp of the mean negative log-probability; at least 1."""
    return math.exp(-sum(token.logprob for token in tokens) / len(tokens))
