"""What peers on torch have in common: sequences of one length in one tensor, a cache that can be cut."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..timers import Timer, synchronize, wall_timer
from ..workload import Ids, Prompts, Workload, common_length


class Stepwise(ABC):
    """See `contestant.Contestant`. A subclass opens the model and says how to run and cut it."""

    name: str

    def __init__(self, path: Path, device: torch.device, *, timer: Timer | None = None) -> None:
        self._path, self._device = path, device
        self._timer = timer or wall_timer()
        self._held: list[Ids] = []  # what the cache is of
        self._next = torch.zeros(0)  # int64 (batch, 1)

    @abstractmethod
    def _restart(self, load: Workload) -> None:
        """An empty cache for `load`."""

    @abstractmethod
    def _cut(self, length: int) -> None:
        """Leave the first `length` tokens in the cache."""

    @abstractmethod
    def _forward(self, ids: Tensor) -> Tensor:
        """ids int64 (batch, tokens) go behind what is in the cache; logits (batch, vocab) after the last."""

    @abstractmethod
    def details(self) -> Mapping[str, object]:
        """See the protocol."""

    @abstractmethod
    def close(self) -> None:
        """See the protocol."""

    def set_threads(self, count: int) -> None:
        """See the protocol."""
        torch.set_num_threads(count)

    def prepare(self, load: Workload, prompts: Prompts) -> None:
        """See the protocol."""
        self._restart(load)
        self._held = []
        self.cold(prompts.cold)
        self.decode(prompts.deep, min(4, load.generate), known=prompts.deep_is_known)

    def cold(self, prompts: Sequence[Ids]) -> float:
        """See the protocol."""
        self._cut(0)
        self._held = []
        return self._timer(lambda: self._feed(prompts))

    def turn(self, prompts: Sequence[Ids]) -> float:
        """See the protocol."""
        return self._timer(lambda: self._feed(prompts))

    def decode(self, prompts: Sequence[Ids], tokens: int, *, known: bool) -> float:
        """See the protocol."""
        self._feed(prompts)
        return self._timer(lambda: self._steps(tokens))

    @torch.inference_mode()
    def _feed(self, prompts: Sequence[Ids]) -> None:
        known = (
            min((common_length(a, b) for a, b in zip(self._held, prompts, strict=True)), default=0) if self._held else 0
        )
        start = min(known, len(prompts[0]) - 1)
        self._cut(start)
        rows = torch.tensor([ids[start:] for ids in prompts], device=self._device)
        self._next = self._forward(rows).argmax(-1, keepdim=True)
        self._held = list(prompts)
        synchronize(self._device)

    @torch.inference_mode()
    def _steps(self, count: int) -> None:
        for _ in range(count):
            drawn = self._next.tolist()  # a program needs every token as it comes, to show it
            self._held = [(*ids, token[0]) for ids, token in zip(self._held, drawn, strict=True)]
            self._next = self._forward(self._next).argmax(-1, keepdim=True)
        synchronize(self._device)
