"""Stop ids and stop strings: the text never depends on how it was cut into pieces."""

from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.generation.stops import StopIds, find_stop, held_back
from exl_runtime.generation.stream import StopStream


def through(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    stream = StopStream(stops)
    text = "".join(stream.push(piece) for piece in pieces)
    return text + stream.finish(), stream.stopped


def by_letters(stops: tuple[str, ...], text: str) -> tuple[str, bool]:
    """The definition: read letter by letter, stop at the first letter that completes a stop string."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


def test_stop_ids() -> None:
    ids = StopIds({7, 8}, {8, 9})
    assert [ids.reason(token) for token in (6, 7, 8, 9)] == [None, "eos", "eos", "stop"]


def test_by_hand() -> None:
    assert find_stop("xabcx", ("bc", "b", "zz")) == (2, 3)
    assert find_stop("xabcx", ("bc", "abc")) == (1, 4)
    assert find_stop("x", ("y",)) is None
    assert held_back("hello wor", ("world", "rx")) == 3
    assert held_back("aab", ("ab",)) == 0
    assert through(("</s>",), ["a<", "/", "sx", "</s", "> b"]) == ("a</sx", True)
    assert through(("</s>",), ["a</s"]) == ("a</s", False)


def test_text_comes_out_as_soon_as_it_is_safe() -> None:
    stream = StopStream(("stop",))
    assert [stream.push(piece) for piece in ("a s", "t", "a", "sto", "x", "stop", "more")] == [
        "a ",
        "",
        "sta",
        "",
        "stox",
        "",
        "",
    ]
    assert StopStream().push("anything") == "anything"


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    st.lists(st.text("ab", max_size=5), max_size=8),
)
@settings(max_examples=400, deadline=None)
def test_text_does_not_depend_on_the_pieces(stops: tuple[str, ...], pieces: list[str]) -> None:
    assert through(stops, pieces) == by_letters(stops, "".join(pieces))


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple), st.text("ab", max_size=20))
@settings(max_examples=200, deadline=None)
def test_nothing_is_shown_that_a_stop_string_takes_back(stops: tuple[str, ...], text: str) -> None:
    stream, shown = StopStream(stops), ""
    final, stopped = by_letters(stops, text)
    for letter in text:
        shown += stream.push(letter)
        assert final.startswith(shown)
    assert stream.stopped == stopped
