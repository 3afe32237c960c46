"""Classifier-free guidance: the same reply after another prompt, and logits that lean away from it.

Source: Sanchez et al. 2023, "Stay on topic with classifier-free guidance": log p = n + scale * (c - n), where c and n
are the log-probabilities after the prompt and after the negative prompt.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import TypeAlias

import torch
from torch import Tensor

from ..cache.pools import Pools, unrolled

# ids, page table of every pool, start, rope length -> logits
Compute: TypeAlias = Callable[[Many[int], Many[Many[int]], int, int], Tensor]


class Shadow:
    """The reply behind the negative prompt. Its pages are its own: never shared, never found by others."""

    def __init__(self, prompt: Many[int], *, scale: float, most: int, rope_length: int) -> None:
        """`most`: tokens of prompt and reply together, at the longest."""
        self.prompt = tuple(prompt)
        self.scale = scale
        self.most = most
        self.rope_length = rope_length
        self._pools: Pools | None = None
        self._lent: list[list[int]] = []
        self._known: list[int] = []  # tokens whose keys and values are computed

    def open(self, pools: Pools, new: int) -> None:
        """Take pages, for `new` tokens in a pass. Raises CacheFull."""
        self._lent, self._pools = pools.lend(self.most, new), pools

    def guided(self, row: Tensor, reply: Many[int], *, compute: Compute) -> Tensor:
        """float32 (vocab,): `row`, the logits for what follows `reply`, led away from the negative prompt.

        `compute` is `Runner.last_logits`. The pages have to be there.
        """
        assert self._pools is not None, "no pages"
        tokens = [*self.prompt, *reply]
        start = self._begin(min(_common(self._known, tokens), len(tokens) - 1))
        count = -(-len(tokens) // self._pools.page_size)
        tables = [unrolled(lent, count) for lent in self._lent]
        against = torch.log_softmax(compute(tokens[start:], tables, start, self.rope_length), dim=-1)
        self._known = tokens
        return against + self.scale * (torch.log_softmax(row, dim=-1) - against)

    def release(self) -> None:
        """Give the pages back; what was computed is gone."""
        if self._pools is not None:
            self._pools.take_back(self._lent)
        self._pools, self._lent, self._known = None, [], []

    def _begin(self, start: int) -> int:
        """`start`, or 0 where pages that are in sight from there have been written over."""
        assert self._pools is not None
        last = (len(self._known) - 1) // self._pools.page_size
        for pool, lent in zip(self._pools, self._lent, strict=True):
            if pool.first(start) <= last - len(lent):
                return 0
        return start


def _common(a: Many[int], b: Many[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
