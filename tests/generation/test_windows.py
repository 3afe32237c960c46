"""Layers with windows keep what they see: the same replies in few pages, whatever else runs and whoever comes back.

The fake hashes what every layer sees of its own pages: a page that left too early, or that somebody else writes to,
gives other tokens.
"""

from collections.abc import Sequence

import pytest
from fakes import FakeSpec, FakeTransformer, Rig, expected, logits_of, request
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.cache.geometry import pages_seen
from exl_runtime.errors import UsageError

SIZE, NEW, CONTEXT = 4, 8, 400
ALL_ALIKE, MIXED, TWO = (6, 6), (None, 6), (13, 6)
KINDS = [ALL_ALIKE, MIXED, TWO]


def counts(windows: Sequence[int | None], *, times: int = 1, context: int = CONTEXT) -> tuple[int, ...]:
    """Pages of every pool for so many sequences of the longest kind, and one for a copy."""
    kinds = sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
    return tuple(times * pages_seen(window, NEW, SIZE, -(-context // SIZE)) + 1 for window in kinds)


def rig_of(windows: tuple[int | None, ...], *, times: int = 1, context: int = CONTEXT, **rest: object) -> Rig:
    rest = {"pages": counts(windows, times=times, context=context), **rest}
    return Rig(spec=FakeSpec(windows=windows), context=context, prefill_tokens=NEW, **rest)


def prompt_of(count: int, start: int = 0) -> list[int]:
    return [(start + 7 * k * k + 3 * k) % 29 for k in range(count)]


def ask(rig: Rig, prompt: Sequence[int], count: int = 4, seed: int = 0, **rest: object) -> tuple[int, ...]:
    (result,) = rig.generator.run([request(prompt, count, seed=seed, **rest)])
    rig.check()
    assert result.ids == tuple(expected(prompt, count, seed=seed, windows=rig.spec.windows))
    return result


def long_seed(windows: Sequence[int | None], prompt: Sequence[int], count: int) -> int:
    """A seed with which the reply gets that long."""
    return next(s for s in range(999) if len(expected(prompt, count, seed=s, windows=windows)) == count)


@pytest.mark.parametrize("windows", KINDS)
@pytest.mark.parametrize("speculate", ["off", "auto"])
def test_a_long_prompt_and_a_long_reply_take_few_pages(windows, speculate: str) -> None:
    prompt, rig = prompt_of(90), rig_of(windows)
    ask(rig, prompt, 120, seed=long_seed(windows, prompt, 120), speculate=speculate)
    assert sum(sum(new) for new in rig.model.passes) >= 90 + 119
    assert rig.kv.counts[-1] == pages_seen(6, NEW, SIZE, 99) + 1 == 6


def test_pages_of_a_reply_are_as_many_as_the_window_sees() -> None:
    rig = rig_of(ALL_ALIKE, times=8)
    seed = long_seed(ALL_ALIKE, prompt_of(30), 60)
    rig.generator.submit(request(prompt_of(30), 60, seed=seed))
    held = []
    while rig.generator.busy:
        rig.generator.step()
        held.append(rig.table.pages - rig.table.available)
    assert max(held) <= pages_seen(6, NEW, SIZE, 99) and max(held[-50:-1]) <= pages_seen(6, 1, SIZE, 99) + 1


@pytest.mark.parametrize("windows", KINDS)
def test_the_next_turn_finds_what_is_in_sight(windows) -> None:
    rig, said = rig_of(windows, times=2), prompt_of(50)
    for number in range(6):
        result = ask(rig, said, 9, seed=number)
        if number:
            assert result.prompt_tokens - result.reused_tokens == 4, number
        said += [*result.ids, number, 7, 11]
    # A beginning whose last tokens have long left every window is found while nobody needed the pages ...
    assert rig_reuse(rig, windows, 50) >= 0


def rig_reuse(rig: Rig, windows: Sequence[int | None], length: int) -> int:
    return ask(rig, [*prompt_of(length), 30], 2, seed=5).reused_tokens


@pytest.mark.parametrize("windows", KINDS)
def test_an_earlier_place_is_found_while_its_pages_are_there(windows) -> None:
    rig = rig_of(windows, times=12)
    prompt = prompt_of(120)
    ask(rig, prompt, 2)
    assert ask(rig, [*prompt[:60], 30], 2).reused_tokens == 60
    assert ask(rig, [*prompt[:33], 30], 2).reused_tokens == 33
    small = rig_of(windows)
    ask(small, prompt, 2)
    reused = ask(small, [*prompt[:60], 30], 2).reused_tokens
    assert reused < 60, "what had to make room cannot be found"
    assert ask(small, [*prompt[:60], 30, 1], 2, seed=3).reused_tokens >= 60


@pytest.mark.parametrize("windows", KINDS)
def test_samples_of_one_prompt_share_it(windows) -> None:
    rig, prompt = rig_of(windows, times=5), prompt_of(45)
    results = rig.generator.run([request(prompt, 12, seed=seed) for seed in range(4)])
    rig.check()
    assert [result.ids for result in results] == [
        tuple(expected(prompt, 12, seed=seed, windows=windows)) for seed in range(4)
    ]
    assert [result.reused_tokens for result in results[1:]] == [44] * 3


@pytest.mark.parametrize("windows", KINDS)
def test_who_yields_comes_back_right(windows) -> None:
    """Too few pages for all that run: somebody has to yield, and nobody notices."""
    rig = rig_of(windows, pages=tuple(n + 3 for n in counts(windows, context=100)), context=100)
    prompts = [prompt_of(20 + 7 * k, k) for k in range(6)]
    results = rig.generator.run([request(p, 40, seed=k, speculate="off") for k, p in enumerate(prompts)])
    rig.check()
    for k, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        assert result.ids == tuple(expected(prompt, 40, seed=k, windows=windows))


@pytest.mark.parametrize("windows", KINDS)
def test_logits_of_a_long_text_need_few_pages(windows) -> None:
    rig, text = rig_of(windows), prompt_of(150)
    logits = rig.generator.logits(text)
    rig.check()
    for place in (0, 7, 8, 60, 149):
        assert logits[place].equal(logits_of(text[: place + 1], windows=windows))


@pytest.mark.parametrize("windows", KINDS)
def test_a_draft_model_that_lags_behind_writes_to_nobody(windows) -> None:
    draft = FakeTransformer(FakeSpec(windows=windows))
    rig = rig_of(windows, times=4, draft=draft)
    prompts = [prompt_of(40, k) for k in range(2)]
    for speculate in ("off", "draft", "auto"):
        results = rig.generator.run([request(p, 50, seed=k, speculate=speculate) for k, p in enumerate(prompts)])
        rig.check()
        for k, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            assert result.ids == tuple(expected(prompt, 50, seed=k, windows=windows))


def test_a_context_for_which_the_window_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="no window"):
        rig_of(ALL_ALIKE, context=12, pages=9)


TURN = st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 12), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 3), st.lists(TURN, min_size=1, max_size=6), st.booleans())
def test_any_mixture_of_requests(windows, times: int, turns: list[tuple[int, int, int, int]], together: bool) -> None:
    """Conversations that go on, branch and go back, one by one or all at once, in few pages or in some more."""
    rig = rig_of(windows, times=times, context=120)
    said = [[who] for who in range(3)]
    work = []
    for who, more, count, back in turns:
        prompt = [*said[who][: max(1, len(said[who]) - 9 * back)], *prompt_of(more, who)][:100]
        said[who] = [*prompt, *expected(prompt, count, windows=windows)]
        work.append((prompt, count))
    batches = [work] if together else [[one] for one in work]
    for batch in batches:
        results = rig.generator.run([request(prompt, count) for prompt, count in batch])
        rig.check()
        for (prompt, count), result in zip(batch, results, strict=True):
            assert result.ids == tuple(expected(prompt, count, windows=windows))
