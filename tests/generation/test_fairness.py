"""The token budget of a step, counted in steps: replies go on beside a long prompt, and prompts share what is left."""

import pytest
from fakes import Rig, expected, request

from exl_runtime.generation.stream import Finished, Prefilled, Text


def tokens(length: int, salt: int) -> list[int]:
    return [(7 * i * i + 3 * i + salt) % 25 for i in range(length)]


class Count:
    """Steps of a rig, and in which of them each request was heard of."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.heard: dict[str, list[int]] = {}
        self.first: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        self.ids: dict[str, tuple[int, ...]] = {}
        self.steps = 0

    def step(self) -> None:
        for event in self.rig.generator.step():
            if isinstance(event, Text):
                self.heard.setdefault(event.request_id, []).append(self.steps)
            elif isinstance(event, Prefilled):
                self.first[event.request_id] = self.steps
            elif isinstance(event, Finished):
                self.ended[event.request_id] = self.steps
                self.ids[event.request_id] = event.result.ids
        self.steps += 1

    def drain(self) -> None:
        while self.rig.generator.busy:
            self.step()
        self.rig.check()


def talker(name: str, salt: int, length: int = 60) -> object:
    return request(tokens(3, salt), length, seed=salt, id=name, speculate="off")


@pytest.mark.parametrize("budget", [4, 16, 64])
def test_no_reply_waits_for_a_prompt(budget) -> None:
    """Every step that computes a part of the long prompt gives every reply its token."""
    rig = Rig(pages=200, prefill_tokens=budget)
    count = Count(rig)
    talkers = {f"talker{i}": talker(f"talker{i}", i) for i in range(3)}
    for one in talkers.values():
        rig.generator.submit(one)
    count.step()
    while len(count.first) < 3:
        count.step()
    long = request(tokens(200, 9), 2, id="long", speculate="off")
    rig.generator.submit(long)
    begin = count.steps
    while "long" not in count.first:
        assert count.steps < begin + 250
        before = count.steps
        passes = len(rig.model.passes)
        count.step()
        still = [name for name in talkers if count.ended.get(name, before) >= before]
        # 'z' comes out with the token behind it (see the fakes): the tokens are counted where they are computed.
        assert len(rig.model.passes) == passes + 1
        assert rig.model.passes[-1][: len(still)] == [1] * len(still)
        assert sum(rig.model.passes[-1]) <= max(budget, len(still) + 1)
    shared = budget - 3
    assert count.first["long"] - begin <= -(-200 // shared)
    count.drain()
    for name, one in talkers.items():
        assert list(count.ids[name]) == expected(one.prompt, 60, seed=one.sampling.seed)


def test_a_smaller_budget_costs_steps_and_no_token() -> None:
    found = {}
    for budget in (8, 32, 128):
        rig = Rig(pages=100, prefill_tokens=budget)
        count = Count(rig)
        rig.generator.submit(request(tokens(128, 1), 3, id="a", speculate="off"))
        count.drain()
        found[budget] = count.first["a"] + 1
        assert list(count.ids["a"]) == expected(tokens(128, 1), 3)
        assert max(map(sum, rig.model.passes)) <= budget
    assert found == {8: 16, 32: 4, 128: 1}


def test_two_prompts_share_the_budget() -> None:
    """The first gets half and what the second does not need: a short prompt behind a long one is done at once."""
    rig = Rig(pages=200, prefill_tokens=32)
    count = Count(rig)
    rig.generator.submit(request(tokens(320, 1), 2, id="long", speculate="off"))
    rig.generator.submit(request([26, *tokens(15, 2)], 2, id="short", speculate="off"))
    rig.generator.submit(request([27, *tokens(159, 3)], 2, id="middle", speculate="off"))
    count.drain()
    assert count.first["short"] <= 1
    alone = 320 // 32
    assert alone < count.first["long"] + 1 <= 2 * alone
    assert count.first["middle"] < count.first["long"] + 160 // 32 + 1
    assert all(sum(part) <= 32 for part in rig.model.passes)


def test_samples_wait_for_the_prompt_once_and_then_all_go_on() -> None:
    """Requests with one prompt: it is computed by the first, and every step after that moves all of them."""
    rig = Rig(pages=50, page_size=16, prefill_tokens=16)
    count = Count(rig)
    for index in range(4):
        rig.generator.submit(request(tokens(64, 5), 6, seed=index, id=f"s{index}", speculate="off"))
    count.drain()
    assert sum(map(sum, rig.model.passes)) <= 64 + 3 * 1 + 4 * 6, "the prompt, its last token, the replies"
    assert [count.first[f"s{index}"] for index in range(4)] == [3, 4, 4, 4]
