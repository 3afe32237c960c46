"""Keys and values beside a conversation: commands and files, and the demo model with every cache type."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_runtime import FakeRuntime, Info
from talking import Recorder

import exl_runtime as exl
from exl_runtime.chat import recall, store
from exl_runtime.chat.commands import Conversation, handle
from exl_runtime.chat.kv import kv_path
from exl_runtime.chat.session import ChatSession, ReplySettings
from exl_runtime.errors import SessionError, UsageError

GREEDY = ReplySettings(max_tokens=12, sampling=exl.SamplingParams(temperature=0))


def talk(*replies: str, path: Path | None = None) -> Conversation:
    session = ChatSession(FakeRuntime(list(replies) or ["one", "two"]))
    if path is not None:
        session.keep(path)
    session.send("a")
    return Conversation(session=session, screen=Recorder())


# --- commands and files -----------------------------------------------------------------------------------------------


def test_save_says_the_size_before_and_after_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    chat = talk()
    assert handle(chat, f"/kv save {path}")
    there = kv_path(path)
    assert path.is_file() and there.stat().st_mode & 0o777 == 0o600
    said = chat.screen.said("notice")
    assert "writing keys and values of" in said and f"wrote {there.stat().st_size} B" in said
    assert sorted(child.name for child in tmp_path.iterdir()) == ["talk.json", "talk.json.kv"]


def test_load_opens_what_lies_beside_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    handle(talk(), f"/kv save {path}")
    chat = talk()
    handle(chat, f"/load {path}")
    assert chat.session.runtime.opened == ["talk.json.kv"] and "need not be computed" in chat.screen.said("notice")


def test_a_snapshot_of_another_model_is_refused_in_one_line_and_the_chat_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    handle(talk(), f"/kv save {path}")
    session = ChatSession.load(path, FakeRuntime(["x"], info=Info(name="other")))
    problem = session.kv.told()
    assert problem is not None and "another model" in str(problem) and session.kv.told() is None
    assert session.send("b").text == "x"
    chat = Conversation(session=ChatSession(FakeRuntime(info=Info(name="other"))), screen=Recorder())
    handle(chat, f"/load {path}")
    assert "another model" in chat.screen.said("warning")


def test_drop_and_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    chat = talk()
    handle(chat, "/kv save")
    assert "beside which file" in chat.screen.said("error")
    handle(chat, f"/kv save {path}")
    handle(chat, f"/kv drop {path}")
    assert not kv_path(path).exists() and "freed" in chat.screen.said("notice")
    for line, says in (
        (f"/kv drop {path}", "there is no"),
        (f"/kv load {path}", "there is no"),
        ("/kv nonsense", "nothing to do with"),
        ("/kv auto", "on or off"),
    ):
        before = chat.screen.said("error")
        handle(chat, line)
        assert says in chat.screen.said("error").removeprefix(before)
    handle(chat, "/kv")
    assert "tokens" in chat.screen.said("table")


def test_nothing_said_and_nothing_in_the_cache(tmp_path: Path) -> None:
    session = ChatSession(FakeRuntime())
    with pytest.raises(UsageError, match="nothing was said"):
        session.kv.size()
    session.send("a")
    session.runtime._cached = ()
    with pytest.raises(UsageError, match="nothing of this conversation is in the cache"):
        session.save(tmp_path / "talk.json", kv=True)
    assert not kv_path(tmp_path / "talk.json").exists()


def test_closing_writes_it_only_when_asked_and_only_after_a_reply(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk(path=path).session.close()
    assert not kv_path(path).exists()
    session = ChatSession.resume(path, FakeRuntime(["three"]))
    session.kv.auto = True
    session.close()
    assert not kv_path(path).exists()  # there was nothing new
    session = ChatSession.resume(path, FakeRuntime(["three"]))
    session.kv.auto = True
    session.send("b")
    session.close()
    assert "three" in kv_path(path).read_text()


def test_it_goes_with_its_conversation_and_with_what_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    session = talk(path=path).session
    session.kv.save(path)
    session.delete()
    assert not kv_path(path).exists()
    session.send("b")
    session.kv.save(path)
    session.close(discard=True)
    assert list(tmp_path.iterdir()) == []


def test_auto_goes_on_in_the_next_conversation(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    handle(talk(), f"/save {path}")
    chat = talk()
    handle(chat, "/kv auto on")
    handle(chat, f"/load {path}")
    assert chat.session.kv.auto
    handle(chat, "/kv auto off")
    assert not chat.session.kv.auto and not chat.auto_kv


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SessionError, match=r"cannot write .*talk\.json\.kv"):
        talk().session.kv.save(tmp_path / "file" / "talk.json")


def test_a_full_disk_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = talk().session
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=3))
    with pytest.raises(SessionError, match="the disk has"):
        session.kv.save(tmp_path / "talk.json")
    assert list(tmp_path.iterdir()) == []


# --- what was said is guessed from ------------------------------------------------------------------------------------


def test_an_opened_conversation_is_remembered_newest_last_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    handle(talk("first reply"), f"/save {path}")
    runtime = FakeRuntime()
    session = ChatSession.load(path, runtime)
    assert runtime.remembered == ["a", "first reply"]
    runtime.remembered.clear()
    assert recall.recall(runtime, session.tree.nodes.values(), 5) == 5 and runtime.remembered == ["reply"]


def test_kept_conversations_are_remembered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for number, text in enumerate(("oldest", "middle", "newest")):
        path = store.new_path()
        talk(text, path=path).session.close()
        os.utime(path, (1000 + number, 1000 + number))
    newest = store.paths()[0]
    (store.chats_dir() / "broken.json").write_text("{")
    runtime = FakeRuntime()
    assert recall.recall_kept(runtime, besides=newest) == len("aoldestamiddle")
    assert runtime.remembered == ["a", "oldest", "a", "middle"]
    runtime.remembered.clear()
    monkeypatch.setattr(recall, "LARGEST", 10)
    assert recall.recall_kept(runtime) == 0 and not runtime.remembered
    monkeypatch.setattr(recall, "LARGEST", 1 << 20)
    monkeypatch.setattr(recall, "MOST_KEPT", 9)
    assert recall.recall_kept(runtime, besides=newest) == 9
    assert runtime.remembered == ["st", "a", "middle"]  # the older one gives way


# --- with a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["fp32", "fp16", "bf16", "q8", "q6", "q4", "k6v4"])
def test_reopened_it_costs_one_token(demo, tmp_path: Path, cache: str) -> None:
    """Another process's cache, so to speak: the reply is made again from the file, token for token the same."""
    path = tmp_path / "talk.json"
    with exl.load("demo", context=512, cache=cache, threads=1) as rt:
        session = ChatSession(rt, system="Be brief.", settings=GREEDY)
        session.send("My name is Ada and I like tea.")
        first = session.send("What is my name?")
        size = session.kv.size()
        session.save(path, kv=True)
        assert abs(kv_path(path).stat().st_size - size.nbytes) <= 0.02 * size.nbytes + 1024
    with exl.load("demo", context=512, cache=cache, threads=1) as rt:
        session = ChatSession.load(path, rt)
        assert session.kv.told() is None and session.kv.loaded == size.tokens
        again = session.regenerate()
        assert again.prompt_tokens - again.reused_tokens == 1
        assert again.ids == first.ids
        stats = rt.stats
        assert stats.reused_from_disk >= again.reused_tokens > 0 and stats.hit_rate > 0.9
        assert session.send("Hello!").reused_tokens >= again.prompt_tokens


def test_the_demo_refuses_what_is_not_its_own(demo, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with exl.load("demo", context=512, threads=1) as rt:
        session = ChatSession(rt, settings=GREEDY)
        session.send("Hello!")
        session.save(path, kv=True)
    for options, says in (({"cache": "q8"}, "cache type"), ({"backend": "reference"}, "kernels")):
        with exl.load("demo", context=512, threads=1, **options) as rt:
            session = ChatSession.load(path, rt)
            problem = session.kv.told()
            assert problem is not None and says in problem.problem
            assert session.regenerate().reused_tokens == 0
    damaged = bytearray(kv_path(path).read_bytes())
    damaged[1000] ^= 1
    kv_path(path).write_bytes(damaged)
    with exl.load("demo", context=512, threads=1) as rt:
        session = ChatSession.load(path, rt)
        result = session.regenerate()
        assert result.reused_tokens == 0 and result.ids == tuple(session.tree.path()[-1].ids)
