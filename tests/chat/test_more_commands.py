"""The commands about branches, kept conversations, choosing, files and the machine."""

import gc
import json
import weakref
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime, Info
from talking import Recorder, Typist

from exl_runtime.chat import repl, store
from exl_runtime.chat.commands.base import fenced
from exl_runtime.chat.export import export
from exl_runtime.chat.session import ChatSession, ReplySettings
from exl_runtime.chat.turn import Turn
from exl_runtime.errors import UsageError
from exl_runtime.generation.grammar import Grammar
from exl_runtime.sampling.params import SamplingParams


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def talk(*lines: object, runtime: FakeRuntime | None = None, **options: object) -> tuple[ChatSession, Recorder, Typist]:
    screen, typist = Recorder(), Typist(*lines)
    session = ChatSession(runtime or FakeRuntime(["one", "two", "three", "four"]))
    repl.run(session, screen, typist, **options)
    return session, screen, typist


def contents(session: ChatSession) -> list[str]:
    return [turn.content for turn in session.turns]


def test_branches_from_the_keyboard() -> None:
    session, screen, _ = talk("a", "b", "/branches", "/branch", "c", "/branch good", "/branches", "/goto 1", "/turns")
    assert contents(session) == ["a", "one", "b", "two"]
    tables = [text for kind, text in screen.lines if kind == "table"]
    assert tables[0].splitlines()[1:] == ["1*    2 messages  two"]
    assert tables[1].splitlines()[1:] == ["1    2 messages  two", "2*  good  2 messages, its own from number 1  three"]
    assert "1  user  1 of 2  b" in tables[2]
    assert "branch 1" in screen.said("notice") and "user: b" in screen.said("notice")
    session, screen, _ = talk("a", "/regen", "/branches", "/goto prev", "/goto next", "/goto prev", "/delete branch 2")
    assert contents(session) == ["a", "one"] and len(session.branches) == 1
    assert "reply 2 of 2" in screen.said("notice") and "another reply to number 0" in screen.said("table")
    assert [text for _, text in screen.lines if text in ("1 of 2", "2 of 2")] == ["1 of 2", "2 of 2", "1 of 2"]
    _, screen, _ = talk("/branches", "/branch", "/goto", "/goto 9", "/goto next", "a", "/branch 0", "/branches")
    assert screen.said("error").count("\n  hint") == 2 and screen.said("error").count("nothing was said") == 3
    assert "you are before the first message" in screen.said("notice")


def test_regen_and_delete_by_number() -> None:
    session, screen, _ = talk("a", "b", "/regen 0", "/regen x")
    assert contents(session) == ["a", "three"] and "'x' is no message number" in screen.said("error")
    session, screen, _ = talk("a", "b", "/delete", "/delete 5", "/delete z")
    assert contents(session) == ["a", "one"] and "gone for good" in screen.said("notice")
    assert screen.said("error").count("no message") == 2


def test_replies_can_be_edited() -> None:
    session, screen, typist = talk("a", "/edit reply", "other words", "/continue", "/edit reply 0 typed")
    assert typist.offered[2] == "one" and contents(session) == ["a", "typed"]
    assert [session.tree.nodes[branch.leaf].turn.content for branch in session.branches] == [
        "one", "other wordstwo", "typed"]  # fmt: skip
    _, screen, _ = talk("/edit reply", "a", "/edit reply 4")
    assert screen.said("error").count("there is no message") == 2


def test_an_edited_message_that_starts_with_a_slash_stays_a_message() -> None:
    session, _, typist = talk("//help me", "/edit", "//help us")
    assert typist.offered[2] == "//help me" and contents(session) == ["/help us", "two"]


def test_conversations_are_kept_listed_searched_and_resumed() -> None:
    first, screen, _ = talk("the first talk", "/clear", "the second talk", "/list", "/search FIRST", keep=True)
    assert first.file is None, "let go of at the end"
    listed = [text for kind, text in screen.lines if kind == "table"]
    assert (
        "1*  the second talk" in listed[0] and "2  the first talk" in listed[0] and "1 message, fake-model" in listed[0]
    )
    assert listed[1].splitlines()[1:] == ["2  the first talk  user"]
    assert "exl chat --resume" in screen.said("notice")
    assert len(store.paths()) == 2
    _, screen, _ = talk("/load 2", "goes on", "/load 1", keep=True)
    assert [one.messages for one in store.stored()] == [2, 1]
    assert "this is the conversation you are in" in screen.said("error"), "it changed last, so it is number 1 now"
    _, screen, _ = talk("/search nowhere", "/search", "/load 77")
    assert "no message holds 'nowhere'" in screen.said("error") and "cannot read 77" in screen.said("error")


def test_nothing_is_kept_when_nothing_was_said_or_wanted() -> None:
    talk("/set seed 1", "/turns", keep=True)
    talk("a", "/delete", keep=True)
    _, screen, _ = talk("a", "/list")
    assert store.paths() == [] and "no conversation is kept" in screen.said("error")
    assert "resume" not in screen.said("notice")


def test_a_snapshot_that_is_loaded_is_not_changed(tmp_path: Path) -> None:
    talk("a", "/save talk.json")
    before = (tmp_path / "talk.json").read_bytes()
    talk("/load talk.json", "b", keep=True)
    assert (tmp_path / "talk.json").read_bytes() == before
    assert [one.messages for one in store.stored()] == [2]


def test_resume_says_where_it_was_cut() -> None:
    session = ChatSession(FakeRuntime(["abcdef"]))
    session.keep(store.new_path())
    for event in session.stream("q"):
        if getattr(event, "text", "") == "c":
            session._record._file.abandon()  # killed here
            break
    session = ChatSession.resume(store.paths()[0], FakeRuntime(["def"]))
    screen = Recorder()
    repl.run(session, screen, Typist("/continue"), keep=True)
    assert "cut off" in screen.said("notice") and contents(session) == ["q", "abcdef"]


EVIL = "<script>alert(1)</script> ![p](http://e/x.png) [x](javascript:alert(1)) **bold**\n```\n<b>&\n```"


def test_export(tmp_path: Path) -> None:
    runtime = FakeRuntime([EVIL])
    _, screen, _ = talk("/export md", "/system S", "a & b", "/export md", "/export md", "/export json x.json",
                        "/export html x.html", "/export html x.html", "/export pdf", runtime=runtime)  # fmt: skip
    written = sorted(path.name for path in tmp_path.glob("*.md"))
    assert len(written) == 2 and written[0].startswith("chat-2") and written[0].endswith("-2.md")
    assert "## You\n\na & b\n\n## Model\n\n" + EVIL in (tmp_path / written[1]).read_text()
    document = json.loads((tmp_path / "x.json").read_text())
    assert [message["role"] for message in document["messages"]] == ["system", "user", "assistant"]
    assert document["messages"][2]["content"] == EVIL and document["messages"][2]["meta"]["stop_reason"] == "eos"
    page = (tmp_path / "x.html").read_text()
    assert "a &amp; b" in page and "<strong>bold</strong>" in page and "&lt;b&gt;&amp;" in page
    for bad in ("<script", "<img", 'href="javascript'):
        assert bad not in page
    assert "default-src 'none'" in page and (tmp_path / "x.html").stat().st_mode & 0o777 == 0o600
    assert screen.said("error").count("exists") == 1 and "'pdf' is no format" in screen.said("error")
    assert "nothing was said" in screen.said("error")
    title = export("html", [Turn("user", "x")], system=None, model="<m>", settings={})
    assert "<m>" not in title


def test_presets() -> None:
    session, screen, _ = talk("/seed 5", "/ban 97", "/preset greedy", "/preset", "/preset nonsense")
    assert session.settings.sampling == SamplingParams(temperature=0.0, min_p=0.0, seed=5, banned_tokens=(97,))
    assert "creative" in screen.said("table") and "there are balanced" in screen.said("error")
    talk("/set temperature 0.123", "/seed 7", "/preset save my-own", "/preset save 'no name'")
    session, screen, _ = talk("/preset my-own", "/preset", "/preset delete my-own", "/preset my-own")
    assert session.settings.sampling == SamplingParams(temperature=0.123), "a seed is no style"
    assert "my-own  yours" in screen.said("table") and "no preset 'my-own'" in screen.said("error")
    (store.state_dir() / "presets.json").write_text("[]")
    _, screen, _ = talk("/preset", "/preset greedy")
    assert screen.said("error").count("does not hold presets") == 2


def test_ban_and_bias() -> None:
    session, screen, _ = talk("/ban a 98 'as an AI'", "/ban", "/bias c=2.5 100=-1 e=-inf", "/bias c=0", "hi")
    assert session.settings.sampling.banned_tokens == (97, 98) and session.settings.banned_strings == ("as an AI",)
    assert session.runtime.seen[0][1]["banned_strings"] == ("as an AI",)
    assert session.settings.sampling.logit_bias == {100: -1.0, 101: float("-inf")}
    assert "97  a\n98  b\ntext  as an AI" in screen.said("table")
    assert "99  c  +2.5" in screen.said("table")
    session, screen, _ = talk(
        "/ban 99999999", "/bias ab=1", "/bias a", "/bias a=x", "/bias 'a", "/ban none", "/bias off"
    )
    assert session.settings == ReplySettings()
    for word in ("not one token but 2: a b", "there is no token 99999999", "TOKEN=NUMBER", "quote"):
        assert word in screen.said("error")


def test_json_and_grammars(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    (tmp_path / "list.lark").write_text('start: "a"+')
    for line, grammar in (
        ("/json schema.json", Grammar.json_schema({"type": "object"})),
        ('/json {"type": "array"}', Grammar.json_schema({"type": "array"})),
        ("/json any", Grammar.json_schema(True)),
        ("/grammar list.lark", Grammar.lark('start: "a"+')),
        ("/grammar regex a|b c", Grammar.regex("a|b c")),
        ("/grammar choice yes 'not now'", Grammar.choice(["yes", "not now"])),
    ):
        session, screen, _ = talk("/json", line, "hi", "/continue", "/save talk.json", "/grammar none", "hi")
        assert [options.get("grammar") for _, options in session.runtime.seen] == [grammar, None]
        assert "in one go" in screen.said("error") and screen.said("notice").count("may look like anything") == 2
        assert ChatSession.load(tmp_path / "talk.json", session.runtime).settings.grammar == grammar
        (tmp_path / "talk.json").unlink()
    _, screen, _ = talk("/json {oops", "/json absent.json", "/grammar choice 'a", "/grammar absent")
    assert len(screen.said("error").split("\n")) >= 4 and "not JSON" in screen.said("error")


def test_a_reply_that_was_stopped_leaves_its_tokens_in_the_cache(demo: Path) -> None:
    import exl_runtime as exl

    with exl.load("demo", context=512, threads=1) as runtime:
        session = ChatSession(runtime, max_tokens=60, sampling=SamplingParams(temperature=0.0))
        events = session.stream("Tell me a short story about a fox.")
        for event in events:
            if isinstance(event, exl.Text) and len(session.turns[-1].content) > 60:
                session.cancel()
        partial = session.turns[-1]
        assert partial.meta.stop_reason == "cancelled" and len(partial.content) > 60
        result = session.extend()
        assert result.reused_tokens >= partial.meta.prompt_tokens + partial.meta.generated_tokens - 2
        assert session.turns[-1].content.startswith(partial.content)
        whole = ChatSession(runtime, max_tokens=200, sampling=SamplingParams(temperature=0.0))
        whole.send("Tell me a short story about a fox.")
        assert whole.turns[-1].content.startswith(session.turns[-1].content), "no seam where it was stopped"


def test_replies_of_the_demo_keep_to_the_schema(demo: Path) -> None:
    pytest.importorskip("llguidance")
    import exl_runtime as exl

    schema = '{"type": "object", "properties": {"city": {"enum": ["Oslo", "Lima"]}}, "required": ["city"], '
    schema += '"additionalProperties": false}'
    with exl.load("demo", context=512, threads=1) as runtime:
        session, screen, _ = talk(f"/json {schema}", "/ban Oslo", "Which city is in Norway?", runtime=runtime)
        assert json.loads(session.turns[1].content) == {"city": "Lima"} and not screen.said("error")


def test_probs_and_perplexity() -> None:
    _, screen, _ = talk("/probs", "a", "/probs 2", "/ppl", "/probs x", runtime=FakeRuntime(["xy"]))
    rows = screen.said("table").splitlines()
    assert rows[2].split() == ["y", "100.0%", "\\x7f", "0.0%", "~", "0.0%"]
    assert rows[1].startswith("x  0.1%  \\x7f 63.2%  ~ 23.3%"), "exp(-7) of the geometric series"
    assert screen.said("notice").count("perplexity") == 2 and "over 2 tokens" in screen.said("notice")
    assert "no reply to look at" in screen.said("error") and "not a number" in screen.said("error")


def test_files_go_with_the_next_message(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("```\ncode\n```\n")
    (tmp_path / "binary").write_bytes(b"\x00\x01")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").touch()
    session, screen, _ = talk("/file", "/file notes.md", "/file", "what is this?", "and now?")
    assert session.turns[0].content == "notes.md:\n````\n```\ncode\n```\n````\n\nwhat is this?"
    assert session.turns[2].content == "and now?" and "(13 tokens) goes with" in screen.said("notice")
    session, screen, _ = talk(
        "/file notes.md", "/file none", "hi", *(f"/file {n}" for n in ("binary", "latin", "empty", "."))
    )
    assert session.turns[0].content == "hi" and len(screen.said("error").splitlines()) == 4
    failing = FakeRuntime([("", UsageError("no")), "fine"])
    session, _, _ = talk("/file notes.md", "first", "second", runtime=failing)
    assert "code" in session.turns[0].content, "a message that failed does not use it up"
    assert fenced("a", "x") == "a:\n```\nx\n```"


def test_the_editor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "editor.sh"
    script.write_text(
        '#!/bin/sh\n[ "$1" = fail ] && exit 3\n[ "$1" = empty ] && : > "$2" && exit\necho "/more" >> "$1"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("VISUAL", "")
    monkeypatch.setenv("EDITOR", str(script))
    session, _, _ = talk("/editor start", "/editor")
    assert contents(session) == ["start\n/more", "one", "/more", "two"]
    for value, word in (
        (f"{script} fail", "code 3"),
        ("/no/such", "cannot be started"),
        ("'", "no editor"),
        ("", "no editor"),
    ):
        monkeypatch.setenv("EDITOR", value)
        session, screen, _ = talk("/editor x")
        assert session.turns == () and word in screen.said("error")
    monkeypatch.setenv("VISUAL", f"{script} empty")
    session, screen, _ = talk("/editor x")
    assert session.turns == () and "nothing is sent" in screen.said("notice")


def test_another_model_and_the_memory_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_model(name: str) -> FakeRuntime:
        if name == "demo" and broken:
            raise UsageError("it broke")
        opened.append(name)
        return FakeRuntime(["from " + name], info=Info(name=name))

    broken = False
    first = FakeRuntime(["one"])
    session, screen, _ = talk("a", "/model", "/model demo", "b", "/mem", runtime=first, open_model=open_model)
    assert first.closed and opened == ["demo"] and contents(session) == ["a", "one", "b", "from demo"]
    assert "fake-model" in screen.said("show") and "weights  3.2 MiB" in screen.said("table")
    assert "this program" in screen.said("table") and "free on this machine" in screen.said("table")
    broken = True
    first = FakeRuntime(["one"])
    session, screen, _ = talk("/model absent", "/model .", "/model demo", "b", runtime=first, open_model=open_model)
    assert opened[1:] == ["models/fake-model"], "the one before is opened again"
    assert contents(session)[1] == "from models/fake-model" and "it broke" in screen.said("error")
    assert "'absent' is not a model folder" in screen.said("error") and "config.json" in screen.said("error")
    _, screen, _ = talk("/model demo")
    assert "one model only" in screen.said("error")


def test_switching_frees_the_weights_of_the_first_model(demo: Path) -> None:
    import exl_runtime as exl

    runtimes = [exl.load("demo", context=512, threads=1)]
    model = weakref.ref(runtimes[0]._generator.model)
    assert model() is not None
    gc.freeze()  # as the command line does after a start
    session = ChatSession(runtimes.pop())
    screen = Recorder()
    repl.run(
        session, screen, Typist("What is the capital of France?", "/model demo", "And of Italy?"),
        open_model=lambda name: exl.load(name, context=512, threads=1),
    )  # fmt: skip
    assert model() is None, "the first model is gone before the second one is used"
    assert len(session.turns) == 4 and not screen.said("error")
    session.runtime.close()
