"""Classifier-free guidance: the same reply after another prompt, and logits that lean away from it.

Source: Sanchez et al. 2023, "Stay on topic with classifier-free guidance": log p = n + scale * (c - n), where c and n
are the log-probabilities after the prompt and after the negative prompt.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import TypeAlias

import torch
from torch import Tensor

from ..cache.pages import PageTable

Compute: TypeAlias = Callable[[Many[int], Many[int], int, int], Tensor]  # ids, pages, start, rope length -> logits


class Shadow:
    """The reply behind the negative prompt. Its pages are its own: never shared, never found by others."""

    def __init__(self, prompt: Many[int], *, scale: float, most: int, rope_length: int) -> None:
        """`most`: tokens of prompt and reply together, at the longest."""
        self.prompt = tuple(prompt)
        self.scale = scale
        self.most = most
        self.rope_length = rope_length
        self.pages: list[int] = []
        self._known: list[int] = []  # tokens whose keys and values are computed

    def guided(self, row: Tensor, reply: Many[int], *, compute: Compute) -> Tensor:
        """float32 (vocab,): `row`, the logits for what follows `reply`, led away from the negative prompt.

        `compute` is `Runner.last_logits`. The pages have to be there.
        """
        tokens = [*self.prompt, *reply]
        start = min(_common(self._known, tokens), len(tokens) - 1)
        against = torch.log_softmax(compute(tokens[start:], self.pages, start, self.rope_length), dim=-1)
        self._known = tokens
        return against + self.scale * (torch.log_softmax(row, dim=-1) - against)

    def release(self, table: PageTable) -> None:
        """Give the pages back; what was computed is gone."""
        table.release(self.pages)
        self.pages, self._known = [], []


def _common(a: Many[int], b: Many[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
