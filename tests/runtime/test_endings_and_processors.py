"""Loops, stop strings and logit processors through the public API, with and without guesses."""

import asyncio

import pytest
import torch

import exl_runtime as exl
from exl_runtime import errors

GREEDY = exl.SamplingParams(temperature=0)
ENDLESS = exl.SamplingParams(temperature=0, ignore_eos=True)
MODES = ("off", "ngram", "auto")
LIST = "Mira has a red apple, a green pear, a blue plum and an old map."
COPY = [{"role": "user", "content": f"Remember this and say it again: {LIST} {LIST}"}]


@pytest.fixture(scope="module")
def rt():
    with exl.load("demo", threads=1, context=512) as runtime:
        yield runtime


def test_a_reply_that_goes_round_in_circles_ends(rt) -> None:
    results = [
        rt.generate("a b a b a b a b a b", max_tokens=300, sampling=ENDLESS, stop_loop=(8, 3), speculate=mode)
        for mode in MODES
    ]
    assert {result.stop_reason for result in results} == {"loop"} and len({result.ids for result in results}) == 1
    ids = results[0].ids

    def loops(end: int) -> bool:
        return any(ids[end - 3 * p : end] == ids[end - p : end] * 3 for p in range(1, min(8, end // 3) + 1))

    assert loops(len(ids)) and not any(loops(end) for end in range(len(ids))), "at the first three in a row"


def test_the_first_stop_string_ends_whatever_is_guessed(rt) -> None:
    whole = rt.generate(COPY, max_tokens=60, sampling=GREEDY, speculate="off").text
    words = [word for word in whole.split() if len(word) > 2]
    for stop in (words[2], words[-1], [words[-1], words[3]]):
        first = min(whole.index(text) for text in ([stop] if isinstance(stop, str) else stop))
        for mode in MODES:
            result = rt.generate(COPY, max_tokens=60, sampling=GREEDY, stop=stop, speculate=mode)
            assert (result.text, result.stop_reason) == (whole[:first], "stop"), (stop, mode)
            events = list(rt.stream(COPY, max_tokens=60, sampling=GREEDY, stop=stop, speculate=mode))
            assert "".join(event.text for event in events if isinstance(event, exl.Text)) == whole[:first]


def test_processors_have_their_way_in_every_mode(rt) -> None:
    plain = rt.generate(COPY, max_tokens=30, sampling=GREEDY)
    unwanted = plain.ids[4]
    seen: list[int] = []

    def without(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        assert logits.dtype == torch.float32 and logits.dim() == 1
        logits[unwanted] = -torch.inf
        return logits

    def milder(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits / 2

    wanted = rt.generate(COPY, max_tokens=30, sampling=exl.SamplingParams(temperature=0, banned_tokens=(unwanted,)))
    for mode in MODES:
        seen.clear()
        result = rt.generate(COPY, max_tokens=30, sampling=GREEDY, processors=[without, milder], speculate=mode)
        assert result.ids == wanted.ids != plain.ids, "as if the token were banned; halves keep the best the best"
        assert seen[0] == plain.prompt_tokens and set(seen) >= set(range(seen[0], seen[0] + len(result.ids)))
    drawn = exl.SamplingParams(seed=4, temperature=0.8, min_p=0)
    hotter = exl.SamplingParams(seed=4, temperature=1.6, min_p=0)
    halved = rt.generate(COPY, max_tokens=30, sampling=drawn, processors=milder)
    assert halved.ids == rt.generate(COPY, max_tokens=30, sampling=hotter).ids, "half the logits, twice the temperature"


def test_a_processor_that_fails_fails_its_own_request(rt) -> None:
    def broken(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("mine")

    async def both() -> tuple[object, str]:
        async def text(**options) -> str:
            events = rt.astream(COPY, max_tokens=20, sampling=GREEDY, **options)
            return "".join([event.text async for event in events if isinstance(event, exl.Text)])

        return tuple(await asyncio.gather(text(processors=broken), text(), return_exceptions=True))

    failed, fine = asyncio.run(both())
    assert isinstance(failed, ZeroDivisionError) and fine == rt.generate(COPY, max_tokens=20, sampling=GREEDY).text
    with pytest.raises(errors.UsageError, match="not callable"):
        rt.generate("x", processors=[3])


def test_priorities_reach_the_scheduler(rt) -> None:
    with pytest.raises(errors.UsageError, match="priority is 'high'"):
        rt.generate("x", priority="high")
    assert rt.stream("x", priority=5)._request.priority == 5, "what it does there: tests/generation/test_scheduler.py"
