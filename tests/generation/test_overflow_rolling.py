"""Conversations longer than the context: what stays is never computed again, and every token sees what it should.

The fake keeps the rope position of a token as its value, and nothing turns its keys: so the oracle below, which lists
what token n sees by plain arithmetic, catches a wrong page, a wrong position and a wrong window alike.
"""

import pytest
from fakes import EOS, FakeTransformer, Rig, request
from rolling import SIZE, computed, rolled, turn

from exl_runtime.generation.stream import Dropped, Started


@pytest.mark.parametrize("keep", [0, 3, 4, 7])
@pytest.mark.parametrize("context", [20, 24, 33])
def test_a_reply_goes_on_and_nothing_is_computed_twice(context: int, keep: int) -> None:
    rig = Rig(context=context, pages=context // SIZE + 1)
    seed = next(s for s in range(999) if len(rolled(range(8), 100, context=context, keep=keep, seed=s)) == 100)
    result = turn(rig, range(8), 100, keep=keep, seed=seed)
    assert result.ids == rolled(range(8), 100, context=context, keep=keep, seed=seed)
    assert computed(rig) == 8 + 99
    # The last token was never computed, so it may be one page that is still in sight.
    last, pages = (8 + 99 - 1) // SIZE, context // SIZE
    assert result.dropped_tokens == (last - pages + 1) * SIZE


def test_turns_of_a_long_conversation_compute_only_what_is_new() -> None:
    context, keep = 32, 5
    rig = Rig(context=context, pages=10)
    said, known = [*range(9)], 0
    for number in range(40):
        result = turn(rig, said, 9, keep=keep, seed=number)
        assert result.ids == rolled(said, 9, context=context, keep=keep, seed=number), number
        assert computed(rig) == len(said) - known + len(result.ids) - 1
        assert result.prompt_tokens - result.reused_tokens == len(said) - known
        known = len(said) + len(result.ids) - 1  # the last token of a reply is computed with the next turn
        said += [*result.ids, number % 31, 7, 11]
    assert len(said) > 10 * context


def test_regenerate_and_branch_of_a_rolled_conversation() -> None:
    rig = Rig(context=32, pages=24)
    said = [*range(9)]
    for number in range(12):
        said += [*turn(rig, said, 9, seed=number).ids, 5]
    turn(rig, said, 6, seed=50)
    for seed in (51, 52):
        result = turn(rig, said, 6, seed=seed)
        assert result.ids == rolled(said, 6, context=32, keep=3, seed=seed)
        assert result.prompt_tokens - result.reused_tokens <= SIZE
    other = [*said[:-3], 1, 2, 3, 4]
    result = turn(rig, other, 6, seed=53)
    assert result.ids == rolled(other, 6, context=32, keep=3, seed=53)


def test_a_prompt_that_was_never_seen_is_cut_and_its_next_turn_found() -> None:
    rig = Rig(context=32, pages=12)
    said = [k % 29 for k in range(150)]
    first = turn(rig, said, 8, seed=1)
    assert first.prompt_tokens <= 24 and first.reused_tokens == 0
    kept = said[:SIZE] + said[len(said) - first.prompt_tokens + SIZE :]
    assert first.ids == rolled(kept, 8, context=32, keep=3, seed=1)
    more = [*first.ids]
    for number in range(2, 12):
        more += [number, 3]
        result = turn(rig, [*said, *more], 8, seed=number)
        assert result.ids == rolled([*kept, *more], 8, context=32, keep=3, seed=number)
        assert computed(rig) == 3 + len(result.ids) - 1
        more += result.ids


def test_another_history_with_the_same_end_finds_nothing_of_it() -> None:
    rig = Rig(context=32, pages=64)
    said = [*range(9)]
    for number in range(10):
        said += [*turn(rig, said, 9, seed=number).ids, 5]
    for place in (SIZE + 1, 20, 40):
        other = [*said]
        other[place] = (other[place] + 1) % EOS
        gone = -(-(len(other) - 29) // 8) * 8  # 3 tokens are for the reply; what leaves is a multiple of a quarter
        kept = [*other[:SIZE], *other[SIZE + gone :]]
        result = turn(rig, other, 3)
        assert result.ids == rolled(kept, 3, context=32, keep=3)


def test_a_crowd_rolls_like_one_alone() -> None:
    rig = Rig(pages=13, context=20)
    requests = [request([k, *range(10)], 60, seed=k, overflow="window", keep=2) for k in range(6)]
    together = rig.generator.run(requests)
    rig.check()
    assert rig.generator.stats.preemptions > 0
    for k, result in enumerate(together):
        assert result.ids == rolled([k, *range(10)], 60, context=20, keep=2, seed=k)


def test_the_smallest_cache_rolls() -> None:
    for context, keep in ((12, 1), (16, 4), (32, 12)):
        rig = Rig(context=context, pages=context // SIZE)
        result = turn(rig, range(6), 80, keep=keep, seed=3)
        assert result.ids == rolled(range(6), 80, context=context, keep=keep, seed=3)


def test_pages_stay_constant_over_ten_thousand_tokens() -> None:
    rig = Rig(context=64, pages=17)
    said, seed, new = [*range(9)], 0, 9
    while len(said) < 10_000:
        result = turn(rig, said, 60, seed=seed)
        assert computed(rig) == new + len(result.ids) - 1
        assert rig.table.idle <= 17
        said += [*result.ids, 1, 2, 3, 4]
        new, seed = 4 + 1, seed + 1


def test_a_draft_model_rolls_along() -> None:
    rig = Rig(context=24, pages=8, draft=FakeTransformer())
    said = [*range(9)]
    for number in range(8):
        result = turn(rig, said, 20, seed=number, speculate="auto")
        assert result.ids == rolled(said, 20, context=24, keep=3, seed=number)
        said += [*result.ids, 5]
    assert rig.generator.stats.accepted_tokens > 0


def test_every_page_that_leaves_is_told_once() -> None:
    rig = Rig(pages=13, context=20)
    requests = [request([k, *range(10)], 60, seed=k, id=str(k), overflow="window", keep=2) for k in range(6)]
    events = list(rig.generator.stream(*requests))
    assert rig.generator.stats.preemptions > 0
    for event in events:
        if hasattr(event, "result"):
            told = sum(e.tokens for e in events if isinstance(e, Dropped) and e.request_id == event.request_id)
            assert told == event.result.dropped_tokens
    assert sum(isinstance(event, Started) for event in events) == 6


def test_windows_of_other_shape_share_nothing_that_depends_on_it() -> None:
    rig = Rig(context=32, pages=64)
    said = [*range(9)]
    for number in range(8):
        said += [*turn(rig, said, 9, keep=8, seed=number).ids, 5]
    for stop in range(9, len(said), 5):
        turn(rig, said[:stop], 1, keep=3)
    result = turn(rig, said, 5, keep=3)
    assert result.ids == rolled(said, 5, context=32, keep=3) and result.reused_tokens > 20
    assert turn(rig, said, 5, keep=8).ids == rolled(said, 5, context=32, keep=8)


def test_a_rolled_conversation_comes_back_from_host_memory() -> None:
    rig = Rig(context=32, pages=9, host_bytes=100_000)
    said, known = [*range(9)], 0
    for number in range(10):
        for k in range(2):  # others take all the pages
            rig.generator.run([request([29 - k, number, *range(26)], 4, overflow="window", speculate="off")])
        result = turn(rig, said, 9, seed=number)
        assert result.ids == rolled(said, 9, context=32, keep=3, seed=number)
        assert result.prompt_tokens - result.reused_tokens == len(said) - known
        rig.generator._scheduler.roller.sinks._kept.clear()
        known = len(said) + len(result.ids) - 1
        said += [*result.ids, number % 31, 7, 11]
    assert len(said) > 3 * 32 and rig.generator.stats.host_tokens > 200
