"""A conversation that grows: how long each turn waits for its first token.

Turn k is everything said so far and `new` tokens more; its reply of `reply` tokens joins what was said. With a cache
that remembers, the wait hardly grows: the new tokens are computed, what came before is only looked at.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from exl_runtime.errors import UsageError
from exl_runtime.sampling.params import SamplingParams

from ..tables import Table, right

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime

SECOND = 1  # the turn that others are compared with: the first has nothing to reuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn: its prompt and what of it was computed, in tokens; seconds to the first token, least of all runs."""

    number: int
    prompt: int
    computed: int
    seconds: float


def talk(
    runtime: "Runtime", vocabulary: Sequence[int], *, turns: int, new: int, reply: int, runs: int
) -> tuple[Turn, ...]:
    """Hold the conversation `runs` times, each time with other random ids. Raises UsageError: it does not fit."""
    needed = turns * (new + reply)
    if needed > runtime.info.context:
        raise UsageError(
            f"{turns} turns take {needed} tokens of context, there are {runtime.info.context}",
            hint="give fewer --turns, or a smaller --prompt or --generate",
        )
    found: dict[int, Turn] = {}
    table = np.asarray(vocabulary)
    for run in range(runs):
        rng = np.random.default_rng((run, turns, new))
        said: list[int] = []
        for number in range(turns):
            said += [int(table[i]) for i in rng.integers(0, len(table), size=new)]
            result = runtime.generate(
                list(said), max_tokens=reply, sampling=SamplingParams(temperature=0), speculate="off"
            )
            turn = Turn(
                number=number + 1,
                prompt=result.prompt_tokens,
                computed=result.prompt_tokens - result.reused_tokens,
                seconds=result.seconds_prefill,
            )
            if number not in found or turn.seconds < found[number].seconds:
                found[number] = turn
            said += result.ids
    return tuple(found[number] for number in range(turns))


def growth(turns: Sequence[Turn]) -> float:
    """How much longer the last turn waits than the second."""
    return turns[-1].seconds / turns[SECOND].seconds


def facts_of(turns: Sequence[Turn], model: str, device: str) -> dict[str, object]:
    """Everything, as one JSON object."""
    return {"model": model, "device": device, "growth": growth(turns), "turns": [asdict(turn) for turn in turns]}


def text_of(turns: Sequence[Turn], model: str, device: str) -> str:
    """A table, what it says, and a last line of JSON."""
    table = Table((right("turn"), right("prompt"), right("computed"), right("first token, ms")))
    for turn in turns:
        table.add(str(turn.number), str(turn.prompt), str(turn.computed), f"{turn.seconds * 1e3:.1f}")
    last = f"turn {turns[-1].number} waits {growth(turns):.2f} times as long as turn 2"
    facts = json.dumps(facts_of(turns, model, device), allow_nan=False)
    return "\n".join((f"{model} on {device}: a growing conversation", "", table.text(), "", last, facts))
