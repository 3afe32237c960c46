"""What is run: how many tokens in, how many out, and which. The same ids for everyone, new ones in every run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exl_runtime.errors import UsageError

TURN = 32  # new tokens after a prefix that is known
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """prompt: tokens of a prompt. generate: tokens after the first one, timed. batch: sequences at once.

    filled: tokens before the first generated one where decoding is timed; None: the prompt's
    """

    prompt: int = 512
    generate: int = 128
    batch: int = 1
    filled: int | None = None
    runs: int = 5

    @property
    def decode_from(self) -> int:
        """Tokens in the context when decoding begins."""
        return self.prompt if self.filled is None else self.filled

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.prompt + TURN, self.decode_from + self.generate) + 1

    def check(self, limit: int) -> None:
        """UsageError where sequences are longer than the `limit` of the model."""
        if self.context > limit:
            raise UsageError(
                f"the run takes {self.context} tokens of context, the model has {limit}",
                hint="give a smaller --prompt, --generate or --context-filled",
            )


@dataclass(frozen=True, slots=True)
class Prompts:
    """Of one run, one per sequence. cold: new. turn: begins like cold. deep: decoding goes on from these."""

    cold: tuple[Ids, ...]
    turn: tuple[Ids, ...]
    deep: tuple[Ids, ...]

    @property
    def deep_is_known(self) -> bool:
        """Whether whoever ran `cold` has seen the tokens of `deep`."""
        return all(deep == cold[: len(deep)] for deep, cold in zip(self.deep, self.cold, strict=True))


def prompts_of(load: Workload, run: int, vocabulary: Sequence[int]) -> Prompts:
    """Random ids out of `vocabulary`, the same for the same run."""
    rng = np.random.default_rng((run, load.prompt, load.batch))
    table = np.asarray(vocabulary)
    total = max(load.prompt + TURN, load.decode_from)
    rows = [tuple(int(table[i]) for i in rng.integers(0, len(table), size=total)) for _ in range(load.batch)]
    return Prompts(
        cold=tuple(row[: load.prompt] for row in rows),
        turn=tuple(row[: load.prompt + TURN] for row in rows),
        deep=tuple(row[: load.decode_from] for row in rows),
    )


def common_length(a: Ids, b: Ids) -> int:
    """Tokens of the longest common beginning."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
