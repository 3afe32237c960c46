"""Conversations that are kept while they go on: what a crash leaves, and what is refused."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exl_runtime.chat import history, session_file, store
from exl_runtime.chat.journal import journal_path
from exl_runtime.chat.session import ChatSession, ReplySettings
from exl_runtime.chat.session_file import SYNC_SECONDS, SessionFile, read_session
from exl_runtime.chat.steps import Grow
from exl_runtime.errors import SessionError, UsageError
from exl_runtime.generation.stream import Text

STATE = ("nodes", "current", "names")


def state(transcript: history.Transcript) -> tuple:
    return (*(getattr(transcript.tree, name) for name in STATE), transcript.system, transcript.settings)


def live(session: ChatSession) -> tuple:
    return (*(getattr(session.tree, name) for name in STATE), session.system, session.settings.to_json())


def kept(path: Path, *replies: object, **options: object) -> ChatSession:
    session = ChatSession(FakeRuntime(list(replies) or ["one", "two", "three"]), **options)
    session.keep(path)
    return session


def test_the_file_is_there_from_the_first_message_on_and_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "talk.json"
    session = kept(path, system="S")
    assert not path.exists() and session.file is None
    session.send("a")
    assert session.file == path
    assert all(one.stat().st_mode & 0o777 == 0o600 for one in (path, journal_path(path)))
    assert [turn.content for turn in ChatSession.load(path, FakeRuntime()).turns] == ["a", "one"]
    session.close()
    assert [child.name for child in path.parent.iterdir()] == ["talk.json"]
    assert state(read_session(path)[0]) == live(session)


def test_every_word_is_on_disk_before_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session = kept(path, "abcdef")
    shown = ""
    for event in session.stream("q"):
        if isinstance(event, Text):
            shown += event.text
            on_disk = read_session(path)[0].turns
            assert [turn.content for turn in on_disk] == ["q", shown]
    assert read_session(path)[0].turns[-1].meta is not None


ACTIONS = st.one_of(
    st.tuples(st.just("send"), st.text(max_size=5)),
    st.tuples(st.sampled_from(["regenerate", "edit", "undo", "delete", "extend", "fail", "reopen"]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["goto", "variant", "name", "reply", "delete_branch"]), st.integers(1, 4)),
    st.tuples(st.sampled_from(["system", "settings", "clear"]), st.integers(1, 3)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, max_size=14), cut=st.integers(0, 10**6))
def test_what_is_on_disk_is_what_is_there_after_anything(tmp_path_factory, actions: list, cut: int) -> None:
    path = tmp_path_factory.mktemp("keeping") / "talk.json"
    session = kept(path, *"12345")
    session.send("first")
    seen = [live(session)]
    for action, value in actions:
        with contextlib.suppress(UsageError):
            session = act(session, action, value, path)
        assert state(read_session(path)[0]) == live(session), action
        seen.append(live(session))
    data = journal_path(path).read_bytes()
    journal_path(path).write_bytes(data[: cut % (len(data) + 1)])  # as a crash may have left it
    again, damaged = read_session(path)
    assert not damaged
    session._record._file.abandon()
    reopened = ChatSession.resume(path, FakeRuntime())
    assert live(reopened) == state(again)
    reopened.send("goes on")
    reopened.close()
    assert state(read_session(path)[0]) == live(reopened) and not journal_path(path).exists()


def act(session: ChatSession, action: str, value: object, path: Path) -> ChatSession:
    if action == "send":
        session.send(value)
    elif action == "edit":
        session.edit(value, "other")
    elif action == "fail":
        session.runtime.replies.insert(0, ("x" * (value - 1), UsageError("no")))
        session.send("fails")
    elif action == "reopen":
        session.close()
        return ChatSession.resume(path, session.runtime)
    elif action == "name":
        session.name_branch(f"name {value}")
    elif action == "reply":
        session.edit_reply(-1, "by hand")
    elif action == "system":
        session.system = f"system {value}"
    elif action == "settings":
        session.settings = ReplySettings(max_tokens=value)
    elif action in ("extend", "clear"):
        getattr(session, action)()
    else:
        getattr(session, action)(value)
    return session


TALK = """
import sys, threading
sys.path.insert(0, sys.argv[2])
from fake_runtime import FakeRuntime
from exl_runtime.chat.session import ChatSession
from exl_runtime.generation.stream import Text
session = ChatSession(FakeRuntime(["first", "x" * 100000], delay=0.002))
session.keep(sys.argv[1])
session.send("hello")
count = 0
for event in session.stream("go on"):
    if isinstance(event, Text):
        count += len(event.text)
        print(count, flush=True)  # what a person has seen
"""


def test_kill_minus_nine_in_the_middle_of_a_reply(repo: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    process = subprocess.Popen(
        [sys.executable, "-c", TALK, str(path), str(repo / "tests")], cwd=repo, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if int(line) == 50:
            break
    os.kill(process.pid, signal.SIGKILL)
    shown = int((process.stdout.read().split() or [50])[-1])
    assert process.wait() == -signal.SIGKILL
    runtime = FakeRuntime(["yz"])
    session = ChatSession.resume(path, runtime)
    assert [turn.content for turn in session.turns[:3]] == ["hello", "first", "go on"]
    assert shown <= len(session.turns[3].content) <= shown + 1, "at most the token being written"
    session.extend()
    assert session.turns[3].content.endswith("xyz") and runtime.seen[0][0][-1] == ord("x")
    session.close()
    assert read_session(path)[0].turns == session.turns


def test_a_file_that_exists_is_gone_on_with_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session = kept(path)
    session.send("a")
    session.close()
    with pytest.raises(SessionError, match="resume"):
        kept(path)
    assert len(ChatSession.load(path, FakeRuntime()).turns) == 2


def test_two_programs_do_not_write_to_one_conversation(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session = kept(path)
    session.send("a")
    with pytest.raises(SessionError, match="another program"):
        ChatSession.resume(path, FakeRuntime())
    assert len(ChatSession.load(path, FakeRuntime()).turns) == 2
    session.close()
    ChatSession.resume(path, FakeRuntime()).close()


def test_a_damaged_line_ends_the_replay_and_nothing_is_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session = kept(path)
    session.send("a")
    session.send("b")
    session._record._file.abandon()
    data = journal_path(path).read_bytes()
    spoiled = data.replace(b'"content":"b"', b'"content":"B"')
    assert spoiled != data
    journal_path(path).write_bytes(spoiled)
    assert read_session(path)[1]
    again = ChatSession.resume(path, FakeRuntime())
    assert [turn.content for turn in again.turns] == ["a", "one"]
    assert Path(f"{journal_path(path)}{session_file.DAMAGED}").read_bytes() == spoiled


def test_a_journal_of_an_older_file_is_not_replayed_twice(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session = kept(path)
    session.send("a")
    old = journal_path(path).read_bytes()
    session.close()
    journal_path(path).write_bytes(old)  # a crash after the file was written, before the journal was emptied
    on_disk, damaged = read_session(path)
    assert on_disk.turns == session.turns and not damaged
    again = ChatSession.resume(path, FakeRuntime())
    assert again.turns == session.turns and len(again.tree.nodes) == 2
    assert sorted(child.name for child in tmp_path.iterdir()) == ["talk.json", "talk.json.journal"]


def test_what_is_deleted_is_not_left_in_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session = kept(path)
    session.send("a secret")
    session.send("b")
    session.delete(0)
    assert b"secret" not in path.read_bytes() + journal_path(path).read_bytes()


def test_a_full_disk_ends_the_keeping_not_the_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    session = kept(path, "one", "two three")
    session.send("a")
    real, budget = os.write, [300]

    def write(descriptor: int, data: bytes) -> int:
        budget[0] -= len(data)
        return real(descriptor, data if budget[0] > 0 else data[:7])  # a short write, as a full disk gives

    monkeypatch.setattr(os, "write", write)
    assert session.send("b").text == "two three"
    problem = session.keeping_problem()
    assert "No space left" in str(problem) and session.keeping_problem() is None and session.file is None
    monkeypatch.undo()
    assert journal_path(path).read_bytes().endswith(b"\n"), "no half line is left for others to stumble over"
    on_disk, damaged = read_session(path)
    assert not damaged and [turn.content for turn in on_disk.turns][:3] == ["a", "one", "b"]


def test_when_the_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, synced = [0.0], []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (synced.append(now[0]), real(descriptor))[1])
    file = SessionFile.create(tmp_path / "talk.json", history.Transcript(), clock=lambda: now[0])
    synced.clear()
    for _ in range(50):
        now[0] += SYNC_SECONDS / 10
        file.append(Grow(1, "x", (1,)))
    assert len(synced) in (4, 5), "once a second within a reply"
    session = kept(tmp_path / "other.json")
    session.send("a")
    synced.clear()
    session.system = "S"
    assert len(synced) == 1


def test_a_long_journal_is_put_into_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_file, "LONG", 1000)
    path = tmp_path / "talk.json"
    session = kept(path, "x" * 50)
    for number in range(5):
        session.send(str(number))
    assert journal_path(path).stat().st_size < 5000
    assert json.loads(path.read_text())["revision"] > 2
    assert read_session(path)[0].turns == session.turns


def test_files_of_version_1_open_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    meta = {"stop_reason": "eos", "prompt_tokens": 3, "reused_tokens": 0, "generated_tokens": 2}
    meta |= {"seconds_prefill": 0.5, "seconds_decode": 1.0}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "meta": meta}]
    old = {"format": history.FORMAT, "version": 1, "model": "m", "system": "S", "settings": {"max_tokens": 9}}
    path.write_text(json.dumps(old | {"turns": turns}))
    session = ChatSession.load(path, FakeRuntime())
    assert [turn.content for turn in session.turns] == ["a", "b"] and session.turns[1].meta.generated_tokens == 2
    assert session.system == "S" and session.settings.max_tokens == 9
    resumed = ChatSession.resume(path, FakeRuntime(["c"]))
    resumed.regenerate()
    resumed.close()
    assert json.loads(path.read_text())["version"] == 2
    assert len(ChatSession.load(path, FakeRuntime()).branches) == 2


def test_tokens_of_another_model_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session = ChatSession(FakeRuntime(["abcdef"]), max_tokens=3)
    session.send("q")
    session.save(path)
    text = path.read_text()
    assert '"97 98 99"' in text
    for ids in ('"1 2 3"', '"97 98 999999999"'):
        path.write_text(text.replace('"97 98 99"', ids))
        runtime = FakeRuntime(["d"])
        ChatSession.load(path, runtime).extend()
        assert runtime.seen[0][0][-3:] == [97, 98, 99]


def test_list_and_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert store.stored() == [] and store.find("1") is None
    for number, word in enumerate(("Straße nach Rom", "the second talk")):
        session = kept(store.new_path(), f"answer {number}")
        session.send(word)
        session.close()
        os.utime(store.paths()[0], (number, number))
    broken = store.chats_dir() / "broken.json"
    broken.write_text("{")
    os.utime(broken, (9, 9))
    listed = store.stored()
    assert [one.title for one in listed] == ["", "the second talk", "Straße nach Rom"]
    assert listed[0].problem and [one.messages for one in listed] == [0, 1, 1]
    hits = list(store.search(["STRASSE", "rom"], listed))
    assert [(hit.stored.number, hit.role) for hit in hits] == [(3, "user")]
    assert [hit.role for hit in store.search(["answer"], listed)] == ["assistant", "assistant"]
    assert store.find("2") == listed[1].path == store.find(listed[1].path.stem)
