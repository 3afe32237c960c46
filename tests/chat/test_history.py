"""Saved conversations: what comes back, and what is refused."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exl_runtime.chat import history
from exl_runtime.chat.session import ChatSession, ReplySettings, Turn
from exl_runtime.errors import SessionError
from exl_runtime.sampling.params import SamplingParams


@pytest.fixture
def session() -> ChatSession:
    sampling = SamplingParams(temperature=0.25, seed=3, logit_bias={5: -math.inf, 7: 1.5}, banned_tokens=(1, 2))
    session = ChatSession(
        FakeRuntime(["grüße 日本", "two"]),
        "be\nbrief",
        settings=ReplySettings(max_tokens=33, stop=("###", "\n\n"), overflow="window", sampling=sampling),
    )
    session.send("a")
    session.send("b")
    return session


def test_everything_comes_back(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "talk.json"
    session.save(path)
    again = ChatSession.load(path, FakeRuntime())
    assert again.turns == session.turns
    assert again.system == session.system
    assert again.settings == session.settings
    assert again.send("c").text == "hello"


def test_the_file_is_private_and_nothing_lies_beside_it(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    os.chmod(path, 0o644)
    session.save(path)
    assert path.stat().st_mode & 0o777 == 0o644
    assert [child.name for child in tmp_path.iterdir()] == ["talk.json"]


def test_a_failed_write_leaves_the_old_file(
    session: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.json"
    session.save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    session.send("c")
    with pytest.raises(SessionError, match="No space left"):
        session.save(path)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["talk.json"]


def test_a_foreign_file_is_not_replaced(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    with pytest.raises(SessionError, match="not a saved chat"):
        session.save(path)
    assert path.read_text() == "my notes"
    with pytest.raises(SessionError):
        session.save(tmp_path)


def damaged() -> dict[str, object]:
    good = {"format": history.FORMAT, "version": 1, "turns": [{"role": "user", "content": "a"}]}
    reply = {"role": "assistant", "content": "b"}
    first, answer = {"id": 1, "parent": 0, "role": "user", "content": "a"}, reply | {"id": 2, "parent": 1}
    tree = {"format": history.FORMAT, "version": 2, "messages": [first, answer], "current": 2}
    return {
        "no messages": tree | {"messages": None},
        "orphan": tree | {"messages": [first, answer | {"parent": 7}]},
        "own parent": tree | {"messages": [first, answer | {"parent": 2}]},
        "same id": tree | {"messages": [first, answer | {"id": 1}]},
        "id of the start": tree | {"messages": [first | {"id": 0}]},
        "id type": tree | {"messages": [first | {"id": "1"}]},
        "two in a row": tree | {"messages": [first, first | {"id": 2, "parent": 1}]},
        "nowhere": tree | {"current": 3},
        "current type": tree | {"current": -1},
        "name of nothing": tree | {"names": {"x": 9}},
        "tokens": tree | {"messages": [first, answer | {"ids": "1 two"}]},
        "tokens type": tree | {"messages": [first, answer | {"ids": [1]}]},
        "key": tree | {"key": 3},
        "revision": tree | {"revision": -1},
        "banned": good | {"settings": {"banned_strings": "abc"}},
        "grammar": good | {"settings": {"grammar": {"kind": "magic", "text": "x"}}},
        "grammar text": good | {"settings": {"grammar": {"kind": "lark", "text": 3}}},
        "empty": b"",
        "text": b"hello",
        "cut": json.dumps(good).encode()[:-7],
        "latin": json.dumps(good).encode()[:-2] + b"\xff}",
        "list": b"[]",
        "other": b'{"a": 1}',
        "nan": b'{"format": "exl-runtime chat", "version": NaN, "turns": []}',
        "deep": b"[" * 200_000,
        "version": good | {"version": 3},
        "version type": good | {"version": True},
        "no turns": {"format": history.FORMAT, "version": 1},
        "turn": good | {"turns": ["a"]},
        "role": good | {"turns": [{"role": "system", "content": "a"}]},
        "order": good | {"turns": [reply]},
        "twice": good | {"turns": [good["turns"][0]] * 2},
        "content": good | {"turns": [{"role": "user", "content": 3}]},
        "surrogate": b'{"format": "exl-runtime chat", "version": 1, "turns": [{"role": "user", "content": "\\ud800"}]}',
        "system": good | {"system": 3},
        "settings": good | {"settings": []},
        "unknown setting": good | {"settings": {"x": 1}},
        "bad setting": good | {"settings": {"max_tokens": -1}},
        "stop": good | {"settings": {"stop": "abc"}},
        "sampling": good | {"settings": {"sampling": 3}},
        "sampling name": good | {"settings": {"sampling": {"temprature": 1}}},
        "sampling value": good | {"settings": {"sampling": {"temperature": "hot"}}},
        "bias": good | {"settings": {"sampling": {"logit_bias": {"x": 1}}}},
        "meta": good | {"turns": [*good["turns"], reply | {"meta": []}]},
        "meta entry": good | {"turns": [*good["turns"], reply | {"meta": {"hello": 1}}]},
        "meta value": good | {"turns": [*good["turns"], reply | {"meta": {"stop_reason": "eos"}}]},
    }


def test_the_documents_that_get_damaged_are_good(tmp_path: Path) -> None:
    path = tmp_path / "good.json"
    messages = [{"id": 1, "parent": 0, "role": "user", "content": "a"}]
    messages += [{"id": number, "parent": 1, "role": "assistant", "content": "b", "ids": "1 2"} for number in (2, 3)]
    path.write_text(json.dumps({"format": history.FORMAT, "version": 2, "messages": messages, "current": 2}))
    session = ChatSession.load(path, FakeRuntime())
    assert len(session.branches) == 2 and len(session.turns) == 2


@pytest.mark.parametrize("kind", damaged())
def test_damage_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    document = damaged()[kind]
    path = tmp_path / "bad\x1b[31m.json"
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    with pytest.raises(SessionError) as caught:
        ChatSession.load(path, FakeRuntime())
    assert "bad" in str(caught.value)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json", Path("/dev/zero")):
        with pytest.raises(SessionError):
            ChatSession.load(path, FakeRuntime())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damage_is_either_harmless_or_a_session_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, cut: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzz.json"
    path.unlink(missing_ok=True)
    history.write(path, history.Transcript.of((Turn("user", "häh?"), Turn("assistant", "ja")), system="s"))
    data = bytearray(path.read_bytes())
    place %= len(data)
    if cut:
        del data[place:]
    else:
        data[place] = byte
    path.write_bytes(data)
    with suppress(SessionError):
        ChatSession.load(path, FakeRuntime())
