"""A context that overflows: every policy, and never in silence."""

import pytest
from fakes import EOS, FakeSampler, Rig, expected, logits_of, request

from exl_runtime.cache.window import cut
from exl_runtime.errors import PromptTooLong
from exl_runtime.generation.stream import Dropped, Finished


def events_of(rig: Rig, one: object) -> list[object]:
    events = list(rig.generator.stream(one))
    rig.check()
    return events


def test_error_is_the_default() -> None:
    with pytest.raises(PromptTooLong):
        events_of(Rig(context=20), request(range(21)))


@pytest.mark.parametrize("policy", ["drop", "window"])
def test_the_oldest_prompt_tokens_leave(policy: str) -> None:
    prompt = [k % 26 for k in range(30)]
    events = events_of(Rig(context=20), request(prompt, 5, overflow=policy, keep=2))
    # 15 tokens may stay; the amount is a multiple of a quarter of the context in pages: 4
    sinks = 2 if policy == "drop" else 4  # a window keeps whole pages
    kept = prompt[:sinks] + prompt[sinks + 16 :]
    assert events[0] == Dropped("request-1", 16, 0)
    result = events[-1].result
    assert (result.dropped_tokens, result.prompt_tokens) == (16, 14)
    assert result.ids == tuple(expected(kept, 5))


def test_a_prompt_that_fits_is_left_alone() -> None:
    for policy in ("drop", "window"):
        events = events_of(Rig(context=20), request(range(10), 5, overflow=policy))
        assert not any(isinstance(event, Dropped) for event in events)


def test_drop_ends_with_the_context() -> None:
    events = events_of(Rig(context=20), request(range(12), None, overflow="drop", seed=1))
    assert events[-1].result.stop_reason == "context"
    assert events[-1].result.generated_tokens == 8


def test_what_the_caller_dropped_is_reported() -> None:
    events = events_of(Rig(), request(range(5), 2, dropped_tokens=40, dropped_turns=3))
    assert events[0] == Dropped("request-1", 40, 3)
    assert (events[-1].result.dropped_tokens, events[-1].result.dropped_turns) == (40, 3)


def test_a_window_of_two_pages_is_computed_again_and_the_reply_goes_on() -> None:
    context, keep, count, seed = 11, 3, 60, 6
    prompt = list(range(8))
    sampler, tokens, generated, drops = FakeSampler(seed), list(prompt), [], []
    while len(generated) < count and EOS not in generated:
        if len(tokens) >= context:
            gone = cut(len(tokens), limit=context - 1, keep=keep, step=2)
            del tokens[gone.start : gone.stop]
            drops.append(gone.tokens)
        token = sampler.sample(logits_of(tokens), prompt, generated).id
        tokens.append(token)
        generated.append(token)
    assert len(drops) > 5
    rig = Rig(context=context)
    events = events_of(rig, request(prompt, count, seed=seed, overflow="window", keep=keep))
    assert [event.tokens for event in events if isinstance(event, Dropped)] == drops
    result = events[-1].result
    assert result.ids == tuple(generated) and result.stop_reason == "length"
    assert result.dropped_tokens == sum(drops) and result.prompt_tokens == len(prompt)


def test_window_without_a_limit_ends_all_the_same() -> None:
    seed = next(seed for seed in range(99) if _is_long(seed))
    events = events_of(Rig(context=20), request([1, 2], None, seed=seed, overflow="window"))
    assert isinstance(events[-1], Finished) and events[-1].result.generated_tokens == 20
    assert events[-1].result.stop_reason == "length"


def _is_long(seed: int) -> bool:
    result = Rig(context=20).generator.run([request([1, 2], None, seed=seed, overflow="window")])[0]
    return result.stop_reason != "eos"


def test_windows_in_a_crowded_cache() -> None:
    rig = Rig(pages=9, context=20)
    requests = [request([k, *range(10)], 40, seed=k, overflow="window", keep=2) for k in range(5)]
    together = rig.generator.run(requests)
    rig.check()
    assert rig.generator.stats.preemptions > 0
    alone = [Rig(context=20).generator.run([one])[0] for one in requests]
    for one, other in zip(together, alone, strict=True):
        assert (one.ids, one.text, one.dropped_tokens) == (other.ids, other.text, other.dropped_tokens)
