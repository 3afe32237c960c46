"""What a model thinks is shown, folded or hidden on the screen, and kept in the conversation; models to complete."""

import json
from types import SimpleNamespace

import pytest
from fake_runtime import FakeRuntime, Info
from marked import MarkedRuntime
from prompt_toolkit.document import Document
from rich.console import Console
from talking import Recorder, Typist
from vt import Terminal

from exl_runtime.chat import memory, repl, status
from exl_runtime.chat.converse import Shown
from exl_runtime.chat.editor import CommandCompleter
from exl_runtime.chat.reply import StyledReply
from exl_runtime.chat.screen import THEME
from exl_runtime.chat.session import ChatSession
from exl_runtime.chat.settings import ReplySettings
from exl_runtime.chat.thinking import Voice
from exl_runtime.chat.tree import Node
from exl_runtime.chat.turn import Turn
from exl_runtime.generation.stream import Text
from exl_runtime.tokenizer.past import past_of
from exl_runtime.tokenizer.reasoning import KNOWN

ANSWERED = {"role": "assistant", "content": "Yes, I do.", "reasoning_content": "Hm."}
THOUGHT = "Let me see, <b> what is it?"
REPLY = "<think>\nLet me see, <b> what is it?\n</think>\n\nIt is <b>four</b>."
ANSWER = "It is <b>four</b>.\n"


def talk(*lines: str, replies: tuple[str, ...] = (REPLY,), source: str = "<think>", opens: bool = False):
    screen, runtime = Recorder(), FakeRuntime(list(replies))
    runtime.template = SimpleNamespace(sources={"default": source})
    if opens:
        render = runtime.render
        runtime.render = lambda m, **o: SimpleNamespace(text=render(m, **o).text + "<think>\n", ids=render(m, **o).ids)
    session = ChatSession(runtime)
    repl.run(session, screen, Typist(*lines))
    return session, screen


def test_thoughts_are_folded_shown_or_hidden_and_kept_anyway() -> None:
    session, screen = talk("a")
    assert screen.text == ANSWER and "thought for 7 words" in screen.said("notice")
    assert session.turns[-1].content == REPLY
    _, screen = talk("/think hide", "a")
    assert screen.text == ANSWER and "thought for" not in screen.said("notice")
    _, screen = talk("/think show", "a")
    assert screen.text == REPLY + "\n" and "thought for" not in screen.said("notice")
    _, screen = talk("/think", "/think loud")
    assert (
        "folded" in screen.said("notice")
        and screen.said("verbatim") == ""
        and "show, fold, hide" in screen.said("error")
    )


def test_a_prompt_that_opens_the_thoughts_and_a_reply_that_never_closes_them() -> None:
    _, screen = talk("a", replies=("so it is four</think>Four.",), opens=True)
    assert screen.text == "Four.\n" and "thought for 4 words" in screen.said("notice")
    _, screen = talk("a", "/set max_tokens 5", replies=("only thoughts",), opens=True)
    assert screen.text == "" and "thought for 2 words" in screen.said("notice")
    assert "stopped" not in screen.said("notice")


def test_a_reply_that_goes_on_amid_thoughts_goes_on_thinking() -> None:
    lines = ("/set max_tokens 4", "a", "/set max_tokens 99", "/continue", "/think")
    session, screen = talk(*lines, replies=("abcdefgh", "efgh</think>Yes."), opens=True)
    assert screen.text.strip() == "Yes." and "thought for 1 words, 4 tokens" in screen.said("notice")
    assert session.turns[-1].content == "abcdefgh</think>Yes." and screen.said("verbatim") == "abcdefgh"
    _, screen = talk("/set max_tokens 23", "a", "/continue", replies=("<think>x</think>so four", " is it"))
    assert "".join(screen.text.split()) == "sofourisit"


def test_a_reply_written_by_hand_is_an_answer() -> None:
    session, screen = talk("a", "/edit reply Five.", "/continue", replies=("x</think>Four.", " Yes."), opens=True)
    assert screen.text.split() == ["Four.", "Yes."] and session.messages[-1]["content"] == "Five. Yes."


def test_a_reply_of_a_program_that_was_killed_amid_thoughts() -> None:
    voice, half = Voice(KNOWN[0], inside=True), Turn("assistant", "half a thou")
    assert voice.reading(Node(2, 1, half, (5, 6))).thinking, "it has tokens and no end: it goes on where it was"
    assert not voice.reading(Node(2, 1, half)).thinking, "written by hand"
    assert not Voice(KNOWN[0]).reading(Node(2, 1, half, (5, 6))).thinking, "this model opens its thoughts itself"


def test_models_without_thoughts_are_shown_as_they_are() -> None:
    _, screen = talk("a", source="no marks here")
    assert screen.text == REPLY + "\n"


@pytest.mark.parametrize("cut", range(1, 9))
def test_pieces_do_not_matter(cut) -> None:
    reading = Voice(KNOWN[0]).reading()
    pieces = [REPLY[i : i + cut] for i in range(0, len(REPLY), cut)]
    parts = [part for piece in pieces for part in reading.push(piece)] + reading.finish()
    assert "".join(text for kind, text in parts if kind == "content") == ANSWER.strip()
    assert (reading.thoughts, reading.words, reading.thinking) == (THOUGHT, 7, False)


def test_thoughts_are_kept_out_of_the_next_prompt_as_the_template_wants() -> None:
    session, _ = talk("a", "b", replies=(REPLY, "Five."))
    asked = session.runtime.seen[-1][0]
    assert [m["content"] for m in asked] == ["a", ANSWER.strip(), "b"]
    assert asked[1]["reasoning_content"] == THOUGHT, "a template may want them again, amid calls of tools say"
    assert session.messages[-1] == {"role": "assistant", "content": "Five."}
    assert session.turns[1].meta.thought_tokens == len(REPLY) - len(ANSWER.strip())
    assert session.turns[3].meta.thought_tokens == 0


def test_turns_that_left_are_those_that_were_sent() -> None:
    """By their digest the runtime finds what is cached of the rest: it has to be made of the messages it was given."""
    runtime = FakeRuntime(["<think>Hm.</think>Yes, I do."], info=Info(context=200))
    runtime.template = SimpleNamespace(sources={"default": "<think>"})
    session = ChatSession(runtime)
    for number in range(8):
        left = [session._message(turn) for turn in session.forgotten]
        session.send(f"fact number {number}")
    assert left[:2] == [{"role": "user", "content": "fact number 0"}, ANSWERED] and len(left) >= 4
    assert runtime.seen[-1][1]["left"].past == past_of(left)


def test_think_shows_the_last_and_set_says_what_is_shown(tmp_path) -> None:
    session, screen = talk("/think", "a", "/think", "/set thoughts hide", "/turns", f"/save {tmp_path}/t.json", "/copy")
    assert "no reply yet" in screen.said("notice") and screen.said("verbatim") == THOUGHT
    assert session.settings.thoughts == "hide" and "thoughts = hide" in screen.said("notice")
    assert ANSWER.strip() in screen.said("table") and "Let me" not in screen.said("table")
    assert screen.copied == [ANSWER.strip()]
    again = ChatSession.load(tmp_path / "t.json", session.runtime)
    assert again.settings.thoughts == "hide" and again.turns == session.turns
    assert "show, fold, hide" in talk("/set thoughts loud")[1].said("error")


@pytest.mark.parametrize("kind", ["md", "json", "html"])
def test_thoughts_are_exported_beside_the_answer(tmp_path, kind) -> None:
    talk("a", f"/export {kind} {tmp_path}/out")
    text = (tmp_path / "out").read_text()
    if kind == "json":
        message = json.loads(text)["messages"][-1]
        assert (message["content"], message["reasoning_content"]) == (ANSWER.strip(), THOUGHT)
        assert message["meta"]["thought_tokens"] > 40
    elif kind == "md":
        assert f"> {THOUGHT}\n\n{ANSWER}" in text
    else:
        assert "<details><summary>Thoughts</summary><pre>Let me see, &lt;b&gt; what" in text
        assert text.index("</details>") < text.index("It is")


def test_the_probability_of_a_reply_with_thoughts() -> None:
    _, screen = talk("a", "/ppl")
    assert f"over {status.count(len(REPLY))} tokens" in screen.said("notice"), "as they were generated"


def test_marks_that_are_special_tokens() -> None:
    screen, runtime = (
        Recorder(),
        MarkedRuntime(["\ue000so <|end\ue001four\ue002", "\ue000again\ue001cut off", "five\ue002"]),
    )
    session = ChatSession(runtime)
    repl.run(session, screen, Typist("a", "/think", "/set max_tokens 7", "b", "/set max_tokens 99", "/continue"))
    assert session.turns[1].content == "<think>so <|end</think>four", "the end is no part of it"
    assert screen.text == "four\nfive\n" and screen.said("verbatim") == "so <|end"
    assert "thought for 2 words, 10 tokens" in screen.said("notice")
    assert runtime.seen[1][0][1] == {"role": "assistant", "content": "four", "reasoning_content": "so <|end"}
    assert session.turns[-1].content == "<think>again</think>five"
    continued = runtime.seen[2][0]
    assert continued[-7:] == list(map(ord, "\ue000again\ue001")), "the very tokens, not their names as text"


def test_without_marks_nothing_is_erased() -> None:
    runtime = MarkedRuntime(["four\ue002"])
    runtime.tokenizer.NAMES = {0xE002: "<|end|>"}
    runtime.tokenizer.special_ids = frozenset({0, 0xE002})
    session = ChatSession(runtime)
    assert session.send("a").text == "four" and session.voice == Voice()


def test_a_note_takes_one_line_of_a_narrow_terminal() -> None:
    terminal = Terminal(30, 6)
    reply = StyledReply(Console(file=terminal, force_terminal=True, width=30, height=6, theme=THEME))
    reply.waiting("thinking … 12 words · …\u4f60\u597d " + "and so on " * 5)
    assert len(terminal.everything) == 1 and terminal.everything[0].startswith("thinking … 12 words")
    reply.waiting("short")
    assert terminal.everything == ["short"]
    reply.text("Yes.")
    reply.finish()
    assert terminal.everything == ["Yes."]


def test_thoughts_on_a_styled_terminal_are_dim_and_apart() -> None:
    terminal = Terminal(40, 12)
    console = Console(file=terminal, force_terminal=True, width=40, color_system="standard", theme=THEME)
    raw: list[str] = []
    terminal.write = lambda text: (raw.append(text), terminal.feed(text))[0]
    reply = StyledReply(console, clock=iter(range(1000)).__next__)
    for piece in ("Let **me** ", "see:\n\n```\nif x:\n"):
        reply.thought(piece)
    for piece in ("It is ", "**four**."):
        reply.text(piece)
    reply.finish()
    assert terminal.everything == ["Let **me** see:", "", "```", "if x:", "", "It is four."]
    assert "\x1b[2;3mLet **me** see:" in "".join(raw), "dim, and no Markdown"


def test_what_is_being_thought_is_told_now_and_then() -> None:
    notes: list[str] = []
    times = iter(i * 0.04 for i in range(1000))
    for mode in ("fold", "hide"):
        runtime = FakeRuntime(["?"])
        runtime.template = SimpleNamespace(sources={"default": "<think>"})
        session = ChatSession(runtime, settings=ReplySettings(thoughts=mode))
        reply = SimpleNamespace(waiting=notes.append, text=notes.append)
        shown = Shown(session, reply, clock=times.__next__)
        for word in ("<think>", "one ", "two ", "three\n", "four ", "five ", "six ", "</think>Yes."):
            shown.take(Text("r", word, (1,), None))
        shown.finish()
    counts = ["thinking … 0 words", "thinking … 3 words", "thinking … 6 words"]
    tails = ["", " · …one two three", " · …one two three four five six"]
    assert notes[:4] == [*(count + tail for count, tail in zip(counts, tails, strict=True)), "Yes."]
    assert notes[4:] == [*counts, "Yes."], "hidden thoughts are counted, not shown"


def test_a_pipe_gets_the_answer_or_all_of_it() -> None:
    for thoughts, wanted in (("fold", ANSWER), ("hide", ANSWER), ("show", REPLY + "\n")):
        runtime, screen = FakeRuntime([REPLY]), Recorder()
        runtime.template = SimpleNamespace(sources={"default": "<think>"})
        session = ChatSession(runtime, settings=ReplySettings(thoughts=thoughts))
        assert repl.run_piped(session, ["a"], screen, verbose=False) == 1
        assert screen.text == wanted


def test_the_start_line_names_attention_and_free_memory() -> None:
    assert "free" not in status.start_line(Info()) and "attention" not in status.start_line(Info())
    assert "2.0 GiB free" in status.start_line(Info(), 2 * 2**30)
    info = SimpleNamespace(**{name: getattr(Info(), name) for name in Info.__dataclass_fields__}, attention="flash")
    assert "attention flash" in status.start_line(info)


def test_models_beside_the_open_one_are_completed(tmp_path) -> None:
    for name in ("alpha", "beta", "none"):
        (tmp_path / name).mkdir()
    for name in ("alpha", "beta"):
        (tmp_path / name / "config.json").write_text("{}")
    models = memory.models_beside(str(tmp_path / "alpha"))
    assert models == ["demo", str(tmp_path / "beta")]
    completer = CommandCompleter(lambda: models)

    def completions(text: str) -> list[str]:
        return [found.text for found in completer.get_completions(Document(text, len(text)), None)]

    assert completions("/model de")[0] == "demo"
    assert str(tmp_path / "beta") in completions(f"/model {tmp_path}/b")
    assert completions("/think f") == ["fold"]
    assert memory.models_beside("/nowhere/at all") == ["demo"]
