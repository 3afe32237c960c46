"""The conversation: what is kept, what is taken back, what the runtime is asked for."""

import threading
from dataclasses import replace

import pytest
from fake_runtime import FakeRuntime, Info

from exl_runtime.chat.session import ChatSession, ReplySettings
from exl_runtime.errors import PromptTooLong, UsageError
from exl_runtime.generation.stream import Dropped, Finished, Text
from exl_runtime.sampling.params import SamplingParams


def contents(session: ChatSession) -> list[str]:
    return [turn.content for turn in session.turns]


def test_send_remembers_both_sides() -> None:
    runtime = FakeRuntime(["one", "two"])
    session = ChatSession(runtime, "be brief")
    result = session.send("a")
    assert (result.text, result.stop_reason) == ("one", "eos")
    session.send("b")
    assert session.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
    ]
    assert session.turns[1].meta.generated_tokens == 3 and session.turns[0].meta is None
    assert session.turns[3].meta.reused_tokens > 0
    assert runtime.seen[1][0] == session.messages[:4]


def test_settings_reach_the_runtime() -> None:
    runtime = FakeRuntime()
    session = ChatSession(runtime, sampling=SamplingParams(seed=7), max_tokens=9, stop=["x"], overflow="window")
    session.send("a")
    options = runtime.seen[0][1]
    assert options == {"max_tokens": 9, "sampling": SamplingParams(seed=7), "stop": ("x",), "overflow": "window"}
    session.settings = replace(session.settings, stop_ids=(5,), stop_loop=(8, 3))
    session.send("b")
    assert runtime.seen[1][1] == {**options, "stop_ids": (5,), "stop_loop": (8, 3)}


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"max_tokens": True}, {"stop": ("",)}, {"overflow": "maybe"}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        ReplySettings(**bad)


def test_stream_ends_with_finished_and_changes_nothing_before_it_runs() -> None:
    session = ChatSession(FakeRuntime(["abc"]))
    events = session.stream("q")
    assert session.turns == ()
    seen = list(events)
    assert isinstance(seen[-1], Finished) and seen[-1].result.text == "abc"
    assert "".join(event.text for event in seen if isinstance(event, Text)) == "abc"
    assert contents(session) == ["q", "abc"]


def test_regenerate_replaces_the_last_reply() -> None:
    runtime = FakeRuntime(["one", "two", "three"])
    session = ChatSession(runtime)
    with pytest.raises(UsageError):
        session.regenerate()
    session.send("a")
    assert session.regenerate().text == "two"
    assert contents(session) == ["a", "two"]
    assert runtime.seen[0][0] == runtime.seen[1][0]


def test_edit_counts_user_messages_and_cuts_what_follows() -> None:
    session = ChatSession(FakeRuntime(["1", "2", "3", "4"]))
    for text in "abc":
        session.send(text)
    session.edit(1, "B")
    assert contents(session) == ["a", "1", "B", "4"]
    session.edit(-1, "again")
    assert contents(session)[2] == "again"
    for index in (2, -3, True, "0"):
        with pytest.raises(UsageError):
            session.edit(index, "x")
    assert len(session.turns) == 4


def test_undo_and_clear() -> None:
    session = ChatSession(FakeRuntime(["1"]), "sys")
    session.send("a")
    session.send("b")
    assert session.undo().content == "b"
    assert contents(session) == ["a", "1"]
    session.clear()
    assert session.messages == [{"role": "system", "content": "sys"}]
    with pytest.raises(UsageError):
        session.undo()


def test_closing_early_keeps_what_was_said() -> None:
    session = ChatSession(FakeRuntime(["abcdef"]))
    events = session.stream("q")
    for event in events:
        if isinstance(event, Text) and event.text == "c":
            break
    events.close()
    assert contents(session) == ["q", "abc"]
    assert session.turns[-1].meta.stop_reason == "cancelled"
    assert not session.making


def test_an_exception_in_the_middle_keeps_what_was_said() -> None:
    session = ChatSession(FakeRuntime([("abc", KeyboardInterrupt())]))
    with pytest.raises(KeyboardInterrupt):
        session.send("q")
    assert contents(session) == ["q", "abc"]


def test_cancel_ends_in_good_order() -> None:
    session = ChatSession(FakeRuntime(["abcdef"]))
    result = None
    for event in session.stream("q"):
        if isinstance(event, Text) and event.text == "b":
            session.cancel()
        if isinstance(event, Finished):
            result = event.result
    assert result.stop_reason == "cancelled" and result.text == "ab"
    assert contents(session) == ["q", "ab"]


def test_cancel_from_another_thread() -> None:
    session = ChatSession(FakeRuntime(["x" * 2000], delay=0.005))
    begun = threading.Event()
    threading.Thread(target=lambda: begun.wait(60) and session.cancel()).start()
    for event in session.stream("q"):
        if isinstance(event, Text):
            begun.set()  # not by a clock: a busy machine may start a reply late
    assert isinstance(event, Finished) and event.result.stop_reason == "cancelled"
    assert 0 < len(contents(session)[1]) < 2000


def test_a_reply_without_a_word_changes_nothing() -> None:
    runtime = FakeRuntime(["one", "never"], prefill_delay=0.2)
    session = ChatSession(runtime)
    session.send("a")
    before = session.turns
    timer = threading.Timer(0.05, session.cancel)
    timer.start()
    assert session.send("b").stop_reason == "cancelled"
    assert session.turns == before
    timer = threading.Timer(0.05, session.cancel)
    timer.start()
    session.regenerate()
    assert session.turns == before


def test_errors_change_nothing() -> None:
    session = ChatSession(FakeRuntime(["1", ("", PromptTooLong("too long"))]))
    session.send("a")
    before = session.turns
    with pytest.raises(PromptTooLong):
        session.send("b")
    with pytest.raises(PromptTooLong):
        session.edit(0, "c")
    assert session.turns == before
    session.runtime.replies = ["fine"]
    assert session.send("d").text == "fine"


def test_an_empty_reply_is_a_reply() -> None:
    session = ChatSession(FakeRuntime([""]))
    session.send("a")
    assert contents(session) == ["a", ""]


def test_extend_goes_on_with_the_same_reply() -> None:
    runtime = FakeRuntime(["abcdef", "ghi"])
    session = ChatSession(runtime, max_tokens=4)
    assert session.send("q").stop_reason == "length"
    session.settings = ReplySettings(max_tokens=100)
    session.extend()
    assert contents(session) == ["q", "abcdghi"]
    prompt = runtime.seen[1][0]
    assert prompt == list(map(ord, "<user>q\n<assistant>abcd"))
    with pytest.raises(UsageError):
        ChatSession(runtime).extend()


def test_turns_that_left_the_context_are_named_once_and_not_sent_again() -> None:
    runtime = FakeRuntime(["r" * 30], info=Info(context=200))
    session = ChatSession(runtime, "S")
    notices = []
    for number in range(6):
        before = len(session.forgotten)
        for event in session.stream(f"question {number}"):
            if isinstance(event, Dropped):
                notices.append((number, event.turns))
                gone = session.forgotten[before:]
                assert [turn.role for turn in gone] == ["user", "assistant"] * event.turns
    assert notices, "the context is small enough to overflow"
    assert len(session.turns) == 12, "nothing disappears from the record"
    assert len(session.forgotten) == 2 * sum(turns for _, turns in notices)
    sent = runtime.seen[-1][0]
    assert sent[0]["role"] == "system" and len(sent) < 12
    forgotten = len(session.forgotten)
    session.edit(-1, "short")
    assert len(session.forgotten) <= forgotten
    session.clear()
    assert session.forgotten == ()


def test_continuing_in_a_full_context_drops_whole_turns() -> None:
    runtime = FakeRuntime(["r" * 30], info=Info(context=200))
    session = ChatSession(runtime, "S", max_tokens=30)
    asked = ["a", "b", "c"]
    for text in asked:
        session.send(text)
    assert not session.forgotten
    whole = [turn.content for turn in session.turns]
    for times in range(2, 5):
        dropped = [event for event in session.stream_extend() if isinstance(event, Dropped | Finished)]
        prompt, _ = runtime.seen[-1]
        assert isinstance(prompt, list) and len(prompt) <= 200 - 30
        left = [turn for turn in session.turns if turn not in session.forgotten]
        seen = runtime.render([{"role": "system", "content": "S"}, *(turn.message for turn in left[:-1])])
        assert prompt == [*seen.ids, *map(ord, "r" * 30 * (times - 1))], "turns leave whole, the system prompt stays"
        result = dropped[-1].result
        told = [(event.tokens, event.turns) for event in dropped[:-1]]
        assert told == ([(result.dropped_tokens, result.dropped_turns)] if result.dropped_turns else [])
    assert len(session.forgotten) == 4 and session.turns[-1].content == "r" * 120
    assert [turn.content for turn in session.turns[:-1]] == whole[:-1]
    session.extend()  # not even alone does the last turn fit: the generator cuts tokens, as it tells
    assert len(session.forgotten) == 4
    session.settings = replace(session.settings, overflow="window")
    session.goto(1)
    session.extend()
    assert not session.forgotten and len(runtime.seen[-1][0]) > 200


def test_turns_that_left_for_a_reply_that_failed_are_back() -> None:
    runtime = FakeRuntime(["r" * 30, "r" * 30, "r" * 30, ("", PromptTooLong("no"))], info=Info(context=200))
    session = ChatSession(runtime)
    for _ in range(3):
        session.send("a question of some length")
    before = session.forgotten
    with pytest.raises(PromptTooLong):
        session.send("x" * 60)
    assert session.forgotten == before


def test_one_reply_at_a_time() -> None:
    session = ChatSession(FakeRuntime(["abc"]))
    events = session.stream("q")
    next(events)
    for action in (lambda: session.send("x"), session.undo, session.clear, lambda: setattr(session, "system", "x")):
        with pytest.raises(UsageError):
            action()
    events.close()
    session.send("x")


@pytest.mark.parametrize("bad", [None, 3, b"bytes", "\ud800"])
def test_messages_must_be_text(bad: object) -> None:
    with pytest.raises(UsageError):
        ChatSession(FakeRuntime()).send(bad)
