"""What leaves an overflowing context: exact cases, and properties over many."""

from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.cache.window import cut, prompt_limit, reserve_for, slack, turns_to_drop


def test_reserve() -> None:
    assert reserve_for(4096, 200) == 200
    assert reserve_for(4096, None) == 256
    assert reserve_for(4096, 100_000) == 1024
    assert reserve_for(2, None) == 1
    assert prompt_limit(4096, 200) == 3896
    assert prompt_limit(2, 5) == 1


def test_slack_is_whole_pages_where_there_are_some() -> None:
    assert slack(4096, 256) == 1024
    assert slack(5000, 256) == 1024
    assert slack(800, 256) == 200
    assert slack(2, 256) == 1


def test_cut_by_hand() -> None:
    assert cut(100, limit=100, keep=4, step=10).tokens == 0
    gone = cut(101, limit=100, keep=4, step=10)
    assert (gone.start, gone.stop) == (4, 14)
    gone = cut(111, limit=100, keep=4, step=10)
    assert (gone.start, gone.stop) == (4, 24)


def test_cut_stays_at_one_place_while_a_prompt_grows() -> None:
    places = {cut(length, limit=3000, keep=4, step=1024).stop for length in range(3001, 4025)}
    assert places == {4 + 1024}


@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 120), st.integers(1, 90))
@settings(max_examples=300, deadline=None)
def test_cut_properties(length: int, limit: int, keep: int, step: int) -> None:
    gone = cut(length, limit=limit, keep=keep, step=step)
    left = length - gone.tokens
    if length <= limit:
        assert gone.tokens == 0
        return
    assert 1 <= left <= limit
    assert 0 <= gone.start <= keep
    assert gone.stop < length  # the last token, which the next one follows, stays
    if keep <= limit // 2:
        assert gone.start == keep
    assert gone.tokens < (length - limit) + step


@given(st.lists(st.integers(1, 50), min_size=0, max_size=12), st.integers(1, 40), st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_turns_to_drop(lengths: list[int], fixed: int, limit: int) -> None:
    def count(dropped: int) -> int:
        return fixed + sum(lengths[dropped:])

    answer = turns_to_drop(count, len(lengths), limit=limit)
    if count(0) <= limit:
        assert answer == 0
    elif count(len(lengths)) > limit:
        assert answer is None
    else:
        assert answer is not None and count(answer) <= limit
        target = limit - limit // 4
        if count(len(lengths)) <= target:
            assert count(answer) <= target < count(answer - 1)  # down to three quarters, and no further
        else:
            assert count(answer - 1) > limit
