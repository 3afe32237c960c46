"""Turns that leave a conversation: what stood behind them is not computed again, and every token sees what it should.

The fake keeps the rope position of a token as its value, and nothing turns its keys: so the list of (token, position)
that a conversation should see is a complete oracle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from fakes import EOS, LAYERS, FakeSampler, FakeSpec, FakeTransformer, Rig, _from_state, request

from exl_runtime.generation.request import Left, Result

SIZE = 4
Seen = list[tuple[int, int]]  # token, position + 1


def say(seen: Seen, count: int, seed: int) -> tuple[int, ...]:
    """What a conversation that sees this says; the tokens are added to it, but the last one, which nobody computed."""
    sampler, generated = FakeSampler(seed), []
    place = seen[-1][1]
    while len(generated) < count and EOS not in generated:
        keys, values = torch.tensor(seen, dtype=torch.float32).T
        generated.append(sampler.sample(_from_state(torch.stack([keys, values] * LAYERS)), (), generated).id)
        seen.append((generated[-1], place + len(generated)))
    return tuple(generated)


@dataclass
class Talk:
    """A conversation of turns, of which the oldest leave when told so; `between`: what a template adds to the first
    one that stays. `seen` is what the next turn should see, had all of it been computed."""

    rig: Rig
    head: list[int]
    between: list[int] = field(default_factory=list)
    turns: list[list[int]] = field(default_factory=list)
    left: int = 0
    seen: Seen = field(default_factory=list)

    def past(self, left: int) -> bytes:
        return b"" if not left else bytes(str(self.turns[:left]), "ascii")

    def prompt(self, left: int) -> list[int]:
        start = [*self.head, *(self.between if left else [])]
        return start + [token for turn in self.turns[left:] for token in turn]

    def ask(self, says: Sequence[int], *, count: int = 6, leave: int = 0, seed: int = 0, **rest: object) -> Result:
        """Say something; `leave` turns have to go for it."""
        self.turns.append([*says])
        before, self.left = self.left, self.left + leave
        left = None
        if self.left:
            whole = tuple(self.prompt(before)) if leave else ()
            left = Left(past=self.past(self.left), whole=whole, before=self.past(before) if leave else b"")
        self.rig.model.passes.clear()
        one = request(self.prompt(self.left), count, seed, overflow="drop", left=left, **{"speculate": "off", **rest})
        (result,) = self.rig.generator.run([one])
        self.rig.check()
        self.turns[-1] += result.ids
        return result

    def check(self, result: Result, says: Sequence[int], *, computed: int, seed: int = 0, count: int = 6) -> None:
        """The reply is right, and cost the pass of so many tokens of the prompt."""
        last = self.seen[-1][1] if self.seen else 0
        self.seen += [(token, last + i) for i, token in enumerate(says, 1)]
        assert result.ids == say(self.seen, count, seed)
        assert result.prompt_tokens - result.reused_tokens == computed
        assert sum(map(sum, self.rig.model.passes)) == computed + len(result.ids) - 1

    def forget(self, turns: int) -> None:
        """What `seen` should be without the oldest turns in it; the last one was not asked yet."""
        gone = sum(len(turn) for turn in self.turns[self.left : self.left + turns])
        del self.seen[len(self.head) : len(self.head) + gone]


def fit_seed(start: int, talk: Talk, says: Sequence[int], count: int) -> int:
    """A seed whose reply does not end early."""
    last = talk.seen[-1][1] if talk.seen else 0
    seen = [*talk.seen, *((token, last + i) for i, token in enumerate(says, 1))]
    return next(s for s in range(start, start + 999) if len(say([*seen], count, s)) == count)


@pytest.mark.parametrize("head", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("prefill", [3, 64])
def test_what_followed_the_turns_that_left_is_not_computed_again(head: int, prefill: int) -> None:
    rig = Rig(pages=40, prefill_tokens=prefill)
    talk = Talk(rig, [20 + k % 5 for k in range(head)])
    talk.seen = [(token, place) for place, token in enumerate(talk.head, 1)]
    for number in range(24):
        says = [number % 19, 7, (3 * number) % 11]
        leave = 2 if number in (5, 9, 10, 17) else 0
        if leave:
            talk.forget(leave)
        seed = fit_seed(number, talk, says, 6)
        result = talk.ask(says, leave=leave, seed=seed)
        # New are what was said, the last token of the reply before, and in the first turn the beginning.
        talk.check(result, says, computed=head + 3 if not number else 4, seed=seed)


def test_a_template_that_begins_otherwise_costs_its_own_tokens_only() -> None:
    rig = Rig(pages=40)
    talk = Talk(rig, [20, 21, 22, 23, 24], between=[26, 27])
    talk.seen = [(token, place) for place, token in enumerate(talk.head, 1)]
    for number in range(4):
        says = [number, 7]
        seed = fit_seed(number, talk, says, 6)
        talk.check(talk.ask(says, seed=seed), says, computed=7 if not number else 3, seed=seed)
    talk.forget(2)
    # They stand right before what stays: where the last token of what left was.
    first = talk.seen[5][1]
    talk.seen[5:5] = [(26, first - 2), (27, first - 1)]
    seed = fit_seed(9, talk, [9, 7], 6)
    result = talk.ask([9, 7], leave=2, seed=seed)
    talk.check(result, [9, 7], computed=2 + 3, seed=seed)
    seed = fit_seed(10, talk, [8, 7], 6)
    talk.check(talk.ask([8, 7], seed=seed), [8, 7], computed=3, seed=seed)
