"""The digest of what left a conversation: the same however it is counted, another for anything else."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from exl_runtime.tokenizer.past import NOTHING, Past, past_of

MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=3)}), max_size=6
)


@given(MESSAGES, st.integers(0, 6))
def test_it_does_not_matter_how_many_left_at_a_time(messages: list[dict[str, str]], cut: int) -> None:
    assert past_of(messages[cut:], past_of(messages[:cut])) == past_of(messages)


@given(MESSAGES, MESSAGES)
def test_others_are_others(one: list[dict[str, str]], two: list[dict[str, str]]) -> None:
    assert (past_of(one) == past_of(two)) == (one == two)
    assert (past_of(one) == NOTHING) == (not one)


@dataclass
class Turn:
    message: dict[str, str]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=12))
def test_growing_reads_only_what_is_new(steps: list[tuple[int, int]]) -> None:
    past, turns, read = Past(), [], []

    def message(turn: Turn) -> dict[str, str]:
        read.append(turn)
        return turn.message

    for number, (kept, count) in enumerate(steps):
        turns = turns[:kept] + [Turn({"content": f"{number} {i}"}) for i in range(3)]
        read.clear()
        assert past.of(turns[:count], message) == past_of([turn.message for turn in turns[:count]])
    again = len(read)
    past.of(turns[: steps[-1][1]] if steps else [], message)
    assert len(read) == again
