"""Turns that leave a conversation: what stood behind them is not computed again, and every token sees what it should.

The fake keeps the rope position of a token as its value, and nothing turns its keys: so the list of (token, position)
that a conversation should see is a complete oracle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from fakes import EOS, LAYERS, FakeSampler, FakeSpec, FakeTransformer, Rig, _from_state, request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

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


def grown(rig: Rig, head: int = 5, turns: int = 5) -> Talk:
    """A conversation of some turns, nothing of which has left."""
    talk = Talk(rig, [20 + k % 5 for k in range(head)])
    talk.seen = [(token, place) for place, token in enumerate(talk.head, 1)]
    for number in range(turns):
        says = [number % 19, 7]
        seed = fit_seed(number, talk, says, 6)
        talk.check(talk.ask(says, seed=seed), says, computed=head + 2 if not number else 3, seed=seed)
    return talk


def test_again_and_in_other_words() -> None:
    talk = grown(Rig(pages=40))
    talk.forget(2)
    before, turns = [*talk.seen], [*talk.turns]
    for leave, says, computed in ((2, [9, 7], 3), (0, [9, 7], 1), (0, [8, 6, 5], 3), (0, [9], 1)):
        talk.seen, talk.turns = [*before], [*turns]
        seed = fit_seed(30, talk, says, 6)
        result = talk.ask(says, leave=leave, seed=seed)
        talk.check(result, says, computed=computed, seed=seed)


def test_several_replies_share_what_was_moved() -> None:
    talk = grown(Rig(pages=40))
    talk.forget(2)
    talk.turns.append([9, 7])
    prompt, whole = talk.prompt(2), talk.prompt(0)
    left = Left(past=talk.past(2), whole=tuple(whole))
    talk.rig.model.passes.clear()
    asked = [request(prompt, 6, seed, overflow="drop", left=left, speculate="off") for seed in range(4)]
    results = talk.rig.generator.run(asked)
    talk.rig.check()
    last = talk.seen[-1][1]
    seen = [*talk.seen, (9, last + 1), (7, last + 2)]
    for seed, result in enumerate(results):
        assert result.ids == say([*seen], 6, seed)
        assert result.prompt_tokens - result.reused_tokens <= 3


@pytest.mark.parametrize("pages", [10, 11, 12, 13, 20])
def test_a_cache_that_is_full_is_overwritten_in_place(pages: int) -> None:
    talk = grown(Rig(pages=pages), turns=4)  # 37 tokens
    talk.forget(1)
    seed = fit_seed(9, talk, [9, 7], 6)
    talk.check(talk.ask([9, 7], leave=1, seed=seed), [9, 7], computed=3, seed=seed)


def test_only_who_lost_the_same_turns_finds_what_followed() -> None:
    talk = grown(Rig(pages=40))
    talk.forget(2)
    seed = fit_seed(9, talk, [9, 7], 6)
    talk.check(talk.ask([9, 7], leave=2, seed=seed), [9, 7], computed=3, seed=seed)
    prompt = [*talk.prompt(2), 3]
    plain = [(token, place) for place, token in enumerate(prompt, 1)]
    for left in (None, Left(past=b"others"), Left(past=b"others", whole=tuple(prompt), before=talk.past(2))):
        one = request(prompt, 6, 1, overflow="drop", left=left, speculate="off")
        (result,) = talk.rig.generator.run([one])
        assert result.ids == say([*plain], 6, 1)
    talk.rig.generator.forget()
    for policy in ("error", "window"):
        one = request(prompt, 6, 1, overflow=policy, left=Left(past=talk.past(2)), speculate="off")
        (result,) = talk.rig.generator.run([one])
        assert result.ids == say([*plain], 6, 1)


def test_a_draft_model_comes_along() -> None:
    rig = Rig(pages=40, draft=FakeTransformer())
    talk = Talk(rig, [20, 21, 22, 23, 24], between=[26])
    talk.seen = [(token, place) for place, token in enumerate(talk.head, 1)]
    for number in range(12):
        says = [number % 19, 7]
        if number == 5:
            talk.forget(2)
            talk.seen.insert(5, (26, talk.seen[5][1] - 1))
        seed = fit_seed(number, talk, says, 9)
        if number == 6:
            before = rig.generator.stats.accepted_tokens
            rig.draft.passes.clear()
        read = sum(map(sum, rig.draft.passes))
        result = talk.ask(says, count=9, leave=2 if number == 5 else 0, seed=seed, speculate="draft")
        last = talk.seen[-1][1]
        talk.seen += [(token, last + i) for i, token in enumerate(says, 1)]
        assert result.ids == say(talk.seen, 9, seed)
        assert sum(map(sum, rig.draft.passes)) - read < 20, "it reads only what is new, too"
        # It sees what the model sees, so that every guess is right.
        assert rig.generator.stats.accepted_tokens == rig.generator.stats.drafted_tokens
    assert rig.generator.stats.accepted_tokens > before


def test_constraints_that_look_at_the_prompt_compute_it() -> None:
    talk = grown(Rig(pages=40))
    talk.turns.append([9, 7])
    left = Left(past=talk.past(2), whole=tuple(talk.prompt(0)))
    prompt = talk.prompt(2)
    one = request(prompt, 4, 1, overflow="drop", left=left, speculate="off", prompt_logprobs=1)
    (result,) = talk.rig.generator.run([one])
    assert result.reused_tokens == 0 and len(result.prompt_logprobs or ()) == len(prompt)


def test_ropes_that_depend_on_the_length_are_not_mixed() -> None:
    talk = grown(Rig(pages=40, spec=FakeSpec(rope_switch=60)))
    talk.turns.append([9, 7])
    prompt, whole = talk.prompt(2), talk.prompt(0)
    left = Left(past=talk.past(2), whole=tuple(whole))
    one = request(prompt, 60 - len(prompt) + 1, 1, overflow="drop", left=left, speculate="off")
    (result,) = talk.rig.generator.run([one])
    assert result.reused_tokens == 0
    plain = [(token, place + 1000 * 61) for place, token in enumerate(prompt, 1)]
    assert result.ids[:6] == say([*plain], 6, 1)


@pytest.mark.parametrize("pages", [34, 38])
def test_a_crowd_that_yields_its_pages(pages: int) -> None:
    rig = Rig(pages=pages)
    talks = [Talk(rig, [20, 21, 22, 23, 24], between=[26]) for _ in range(3)]
    for k, talk in enumerate(talks):
        talk.turns = [[k, 7, *range(9)] for _ in range(3)]
    requests = []
    for talk in talks:
        rig.generator.run([request(talk.prompt(0), 1, 0, overflow="drop", speculate="off")])
        talk.turns.append([9, 7])
        left = Left(past=bytes([talk.turns[0][0] + 1]), whole=tuple(talk.prompt(0)))
        requests.append(request(talk.prompt(1), 60, 1, overflow="drop", left=left, speculate="off"))
    results = rig.generator.run(requests)
    rig.check()
    assert rig.generator.stats.preemptions > 0
    for talk, result in zip(talks, results, strict=True):
        prompt = talk.prompt(1)
        assert result.ids in replies(prompt, len(talk.prompt(0)) - len(prompt), 60)
        # What it computed again in the meantime is what it is without any turn that left.
        known = [*prompt, *result.ids]
        (plain,) = rig.generator.run([request(known, 3, 1, speculate="off")])
        assert plain.ids == say([(token, place) for place, token in enumerate(known, 1)], 3, 1)


def test_who_yields_and_finds_nothing_any_more_begins_as_if_nothing_had_left() -> None:
    talk = grown(Rig(pages=40))
    talk.turns.append([9, 7])
    prompt = talk.prompt(2)
    left = Left(past=talk.past(2), whole=tuple(talk.prompt(0)))
    generator = talk.rig.generator
    generator.submit(request(prompt, 12, 1, overflow="drop", left=left, speculate="off"))
    events = []
    while len(events) < 6:
        events += generator.step()
    (sequence,) = generator._scheduler.running
    assert sequence.shift and sequence.root != sequence.base
    first = tuple(sequence.generated)
    generator._scheduler.requeue(sequence)
    talk.rig.table.clear()
    while generator.busy:
        events += generator.step()
    talk.rig.check()
    seen = [(token, place) for place, token in enumerate([*prompt, *first], 1)]
    assert events[-1].result.ids == (*first, *_going_on(seen, 12, len(first)))


def replies(prompt: list[int], shift: int, count: int) -> set[tuple[int, ...]]:
    """What may be said behind the first 5 tokens and the rest, after a gap or computed again; when it had to yield,
    changing from one to the other in the middle."""
    ways = [[*range(1, len(prompt) + 1)], [*range(1, 6), *range(6 + shift, len(prompt) + 1 + shift)]]
    found = set()
    for first in ways:
        seen = [*zip(prompt, first, strict=True)]
        whole = say([*seen], count, 1)
        found.add(whole)
        for taken in range(1, len(whole)):
            for then in ways:
                last = then[-1]
                places = [*then, *range(last + 1, last + 1 + taken)]
                seen = [*zip([*prompt, *whole[:taken]], places, strict=True)]
                found.add((*whole[:taken], *_going_on(seen, count, taken)))
    return found


def _going_on(seen: Seen, count: int, taken: int) -> tuple[int, ...]:
    sampler, generated, place = FakeSampler(1), [*range(taken)], seen[-1][1] - taken
    while len(generated) < count and EOS not in generated[taken:]:
        keys, values = torch.tensor(seen, dtype=torch.float32).T
        generated.append(sampler.sample(_from_state(torch.stack([keys, values] * LAYERS)), (), generated).id)
        seen.append((generated[-1], place + len(generated)))
    return tuple(generated[taken:])


class Talks(RuleBasedStateMachine):
    """Conversations with one beginning in a small cache. Every reply is one to what may be seen: the first tokens
    where they were or as far on as the rest, and the rest behind gaps that once were; the right one is noted."""

    @initialize(pages=st.sampled_from([14, 20, 30]), host=st.sampled_from([0, 400]), draft=st.booleans())
    def start(self, pages: int, host: int, draft: bool) -> None:
        self.rig = Rig(pages=pages, host_bytes=host, draft=FakeTransformer() if draft else None)
        self.talks = [Talk(self.rig, [20, 21, 22, 23, 24], between=[26] * k) for k in range(3)]
        self.gaps: list[list[int]] = [[] for _ in self.talks]
        self.seed = 0

    @rule(which=st.integers(0, 2), says=st.lists(st.integers(0, 2), min_size=1, max_size=5), leave=st.integers(0, 2))
    def ask(self, which: int, says: list[int], leave: int) -> None:
        talk, gaps = self.talks[which], self.gaps[which]
        while len(talk.prompt(talk.left)) + len(says) + 6 > 50 and talk.left < len(talk.turns):
            talk.left, leave = talk.left + 1, 0  # as somebody who says nothing of it
        leave = min(leave, len(talk.turns) - talk.left)
        before = len(talk.prompt(talk.left))
        self.seed += 1
        kept = talk.left
        result = talk.ask(says, leave=leave, seed=self.seed, count=6)
        prompt = talk.prompt(talk.left)[: -len(result.ids)]
        if leave:
            gaps.append(before + len(says) - len(prompt))
        elif talk.left != kept:
            gaps.clear()
        shifts = {0, *(sum(gaps[place:]) for place in range(len(gaps)))}
        for shift in shifts:
            for head in range(len(prompt) + 1):  # what stays may begin like what left, and then is taken from there
                for turned in {0, shift}:
                    places = [place + (turned if place <= head else shift) for place in range(1, len(prompt) + 1)]
                    if result.ids == say([*zip(prompt, places, strict=True)], 6, self.seed):
                        return
        raise AssertionError("a reply to what cannot be seen")

    @precondition(lambda self: any(talk.turns for talk in self.talks))
    @rule(which=st.integers(0, 2))
    def back(self, which: int) -> None:
        """The last turn is taken back."""
        talk = self.talks[which]
        if len(talk.turns) > talk.left:
            talk.turns.pop()


Talks.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_random_conversations = Talks.TestCase
