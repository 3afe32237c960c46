"""Branches: nothing that was said is lost, and one finds one's way among them."""

import pytest
from fake_runtime import FakeRuntime
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.chat.checks import Wrong
from exl_runtime.chat.session import ChatSession, ReplySettings
from exl_runtime.chat.steps import Add, Go, Grow, Name, Remove, Settle, from_json, to_json
from exl_runtime.chat.tree import START, Tree
from exl_runtime.chat.turn import ReplyMeta
from exl_runtime.errors import UsageError


def contents(session: ChatSession) -> list[str]:
    return [turn.content for turn in session.turns]


def ends(session: ChatSession) -> list[list[str]]:
    return [[node.turn.content for node in session.tree.path(branch.leaf)] for branch in session.branches]


def test_every_version_of_reply_and_message_stays() -> None:
    session = ChatSession(FakeRuntime(["1", "2", "3", "4", "5"]))
    session.send("a")
    session.send("b")
    session.regenerate()
    session.edit(0, "A")
    session.regenerate()
    assert ends(session) == [["a", "1", "b", "2"], ["a", "1", "b", "3"], ["A", "4"], ["A", "5"]]
    assert contents(session) == ["A", "5"]
    assert session.goto(2).number == 2 and contents(session) == ["a", "1", "b", "3"]
    assert session.runtime.seen[-1][0] == [{"role": "user", "content": "A"}]
    session.runtime.replies = ["new"]
    session.send("c")
    assert session.runtime.seen[-1][0][-1] == {"role": "user", "content": "c"} and len(session.turns) == 6
    assert [branch.number for branch in session.branches] == [1, 2, 3, 4], "growing renumbers nothing"
    assert ends(session)[1][-1] == "new"


def test_an_earlier_reply_is_made_again() -> None:
    session = ChatSession(FakeRuntime(["1", "2", "3"]))
    session.send("a")
    session.send("b")
    assert session.regenerate(0).text == "3"
    assert contents(session) == ["a", "3"] and len(session.branches) == 2
    with pytest.raises(UsageError):
        session.regenerate(5)


def test_undo_goes_back_and_what_follows_is_a_branch() -> None:
    session = ChatSession(FakeRuntime(["1", "2", "3"]))
    session.send("a")
    session.send("b")
    assert session.undo().content == "b" and contents(session) == ["a", "1"]
    session.send("c")
    assert ends(session) == [["a", "1", "b", "2"], ["a", "1", "c", "3"]]
    session.undo(0)
    assert session.turns == ()
    session.send("d")
    assert len(session.branches) == 3


def test_names_go_along_and_are_found() -> None:
    session = ChatSession(FakeRuntime(["1", "2", "3", "4"]))
    session.send("a")
    session.name_branch("first try")
    session.send("b")
    session.regenerate()
    session.goto("first try")
    assert contents(session) == ["a", "1", "b", "2"]
    for bad in ("", "7", "x\ny"):
        with pytest.raises(UsageError):
            session.name_branch(bad)
    with pytest.raises(UsageError):
        session.goto("nowhere")
    session.undo()
    with pytest.raises(UsageError):
        session.name_branch("not an end")


def test_variants_turn_like_pages() -> None:
    session = ChatSession(FakeRuntime(["1", "2", "3", "4"]))
    with pytest.raises(UsageError):
        session.variant(1)
    session.send("a")
    session.regenerate()
    session.regenerate()
    assert session.variant(1) == (1, 3) and contents(session) == ["a", "1"]
    session.send("b")
    session.goto(2)
    assert session.variant(-1) == (1, 3) and contents(session) == ["a", "1", "b", "4"]


def test_delete_removes_for_good() -> None:
    session = ChatSession(FakeRuntime(["1", "2", "3", "4"]))
    session.send("a")
    session.send("b")
    session.regenerate()
    session.edit(1, "c")
    session.delete_branch(3)
    assert ends(session) == [["a", "1", "b", "2"], ["a", "1", "b", "3"]] and contents(session) == ["a", "1"]
    session.delete_branch(1)
    assert ends(session) == [["a", "1", "b", "3"]]
    session.goto(1)
    assert session.delete().content == "b" and ends(session) == [["a", "1"]]
    session.delete(0)
    assert session.turns == () and session.branches == ()


def test_a_reply_can_be_written_by_hand_and_continued() -> None:
    runtime = FakeRuntime(["wrong", "wards"])
    session = ChatSession(runtime)
    session.send("q")
    session.edit_reply(0, "to")
    session.extend()
    assert contents(session) == ["q", "towards"] and ends(session)[0] == ["q", "wrong"]
    assert runtime.seen[-1][0] == list(map(ord, "<user>q\n<assistant>to"))


def test_continuing_a_reply_that_was_answered_leaves_it_to_those_answers() -> None:
    session = ChatSession(FakeRuntime(["abcdef", "2", "ghi"]), max_tokens=3)
    session.send("q")
    session.settings = ReplySettings()
    session.send("next")
    session.undo()
    session.extend()
    assert ends(session) == [["q", "abc", "next", "2"], ["q", "abcghi"]]


def test_a_message_without_a_reply_is_replaced_by_the_next() -> None:
    session = ChatSession(FakeRuntime(["1"]))
    session._record.add(START, "user", "lost")
    session.send("again")
    assert contents(session) == ["again", "1"] and session.runtime.seen[0][0][-1]["content"] == "again"


@pytest.mark.parametrize(
    "step",
    [
        Add(1, 5, "user", "x"),
        Add(0, 0, "user", "x"),
        Add(1, 0, "assistant", "x"),
        Add(1, 0, "system", "x"),
        Grow(3, "x", ()),
        Settle(3, "x", None, ()),
        Go(3),
        Remove(3),
        Name(3, "x"),
    ],
)
def test_impossible_steps_change_nothing(step: object) -> None:
    tree = Tree()
    with pytest.raises(Wrong):
        tree.take(step)
    assert (tree.nodes, tree.current, tree.next_id, tree.branches()) == ({}, START, 1, ())


META = ReplyMeta(stop_reason="eos", prompt_tokens=1, reused_tokens=0, generated_tokens=2, seconds_prefill=0.5,
                 seconds_decode=0.25)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8)), max_size=40))
def test_any_steps_keep_the_tree_a_tree(moves: list[tuple[int, int]]) -> None:
    tree = Tree()
    for kind, number in moves:
        at = ([START, *tree.nodes])[number % (len(tree.nodes) + 1)]
        role = "user" if at == START or tree.nodes[at].turn.role == "assistant" else "assistant"
        step = [
            Add(tree.next_id, at, role, f"m{number}", META if role == "assistant" else None, (number,)),
            Grow(at, "é", (1, number)),
            Settle(at, "done", META, (2,)),
            Go(at),
            Remove(at),
            Name(at, f"n{number % 3}"),
            Add(tree.next_id, at, role, ""),
        ][kind]
        assert from_json(to_json(step)) == step
        try:
            tree.take(step)
        except Wrong:
            assert at == START or (isinstance(step, Name) and tree.after(at))
        leaves = {id for id in tree.nodes if not tree.after(id)}
        branches = tree.branches()
        assert {branch.leaf for branch in branches} == leaves
        assert len({branch.first for branch in branches}) == len(branches)
        assert tree.current == START or tree.current in tree.nodes
        assert set(tree.names.values()) <= leaves
        for node in tree.nodes.values():
            roles = [one.turn.role for one in tree.path(node.id)]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
            assert node.id in tree.siblings(node.id) and not tree.after(tree.latest(node.id))
