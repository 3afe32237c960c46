"""The slash commands, against a runtime without a model and a screen that remembers."""

import dataclasses
import math
import typing
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime, Info
from talking import Recorder, Typist

from exl_runtime.chat import repl
from exl_runtime.chat.commands import COMMANDS, Conversation, handle, message
from exl_runtime.chat.session import ChatSession, ReplySettings
from exl_runtime.chat.settings import change, get_setting, setting_names, shown
from exl_runtime.errors import UsageError
from exl_runtime.sampling.params import SamplingParams


def talk(*lines: typing.Any, runtime: FakeRuntime | None = None) -> tuple[ChatSession, Recorder, Typist]:
    runtime = runtime or FakeRuntime(["one", "two", "three", "four"])
    screen, typist = Recorder(), Typist(*lines)
    session = ChatSession(runtime)
    repl.run(session, screen, typist)
    return session, screen, typist


def test_a_conversation() -> None:
    session, screen, _ = talk("hi", "there", "/exit", "never")
    assert [turn.content for turn in session.turns] == ["hi", "one", "there", "two"]
    assert screen.text == "one\ntwo\n"
    assert "gen 3 tok" in screen.said("notice") and "cached" in screen.said("notice")


@pytest.mark.parametrize("line", ["/help", "/?", "/h"])
def test_help_names_every_command(line: str) -> None:
    _, screen, _ = talk(line)
    wanted = "help system set sampler regen undo edit clear save load template stats exit continue tokens copy"
    for name in wanted.split(" "):
        assert f"/{name}" in screen.said("table")
    _, screen, _ = talk("/help set", "/help nonsense")
    assert "/set [NAME [VALUE]]" in screen.said("show")
    assert "no command" in screen.said("error")


def test_names_are_unique() -> None:
    names = [name for command in COMMANDS for name in (command.name, *command.aliases)]
    assert len(names) == len(set(names))


def test_unknown_commands_offer_the_nearest_and_are_not_sent() -> None:
    session, screen, _ = talk("/regne", "/usr/bin is what?", "/")
    assert "/regen" in screen.said("error")
    assert "//" in screen.said("error")
    assert session.turns == ()


def test_commands_for_pictures_say_why_there_are_none() -> None:
    session, screen, _ = talk("/image cat.png")
    assert "/image: the models that this program runs read text only" in screen.said("error")
    assert "did you mean" not in screen.said("error") and session.turns == ()


def test_a_doubled_slash_is_a_message() -> None:
    session, _, _ = talk("//help me", "/ /")
    assert session.turns[0].content == "/help me"
    assert message("plain") == "plain"


def test_regen_undo_edit_clear() -> None:
    session, _, _ = talk("a", "/regen")
    assert [turn.content for turn in session.turns] == ["a", "two"]
    session, screen, _ = talk("a", "b", "/undo", "/undo", "/undo")
    assert session.turns == () and "nothing was said" in screen.said("error")
    session, _, _ = talk("a", "b", "/edit 0 A new one")
    assert [turn.content for turn in session.turns] == ["A new one", "three"]
    session, _, _ = talk("a", "b", "/edit all new")
    assert [turn.content for turn in session.turns] == ["a", "one", "all new", "three"]
    session, screen, _ = talk("a", "/edit 7 x", "/edit 7", "/clear")
    assert session.turns == () and screen.said("error").count("there is no message") == 2


def test_edit_offers_the_message_on_the_input_line() -> None:
    session, _, typist = talk("first", "second", "/edit 0", "changed")
    assert typist.offered == ["", "", "", "first", ""]
    assert [turn.content for turn in session.turns] == ["changed", "three"]


def test_regen_says_when_nothing_can_change() -> None:
    _, screen, _ = talk("a", "/set seed 5", "/regen", "/set temperature 0", "/regen")
    assert "seed is fixed (5)" in screen.said("notice") and "temperature 0" in screen.said("notice")


def test_system() -> None:
    session, screen, _ = talk("/system", "/system Be brief.", "hi", "/system none")
    assert session.runtime.seen[0][0][0] == {"role": "system", "content": "Be brief."}
    assert session.system is None and "no system prompt" in screen.said("verbatim")


def test_set_shows_and_changes() -> None:
    session, screen, _ = talk("/set", "/set temperature 0.25", "/set top_k=7", "/set max-tokens 9", "/set temperature")
    for name in setting_names():
        assert f"\n{name}  " in screen.said("table")
    assert session.settings.sampling.temperature == 0.25 and session.settings.sampling.top_k == 7
    assert session.settings.max_tokens == 9 and "temperature = 0.25" in screen.said("show")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("/set temprature 1", "temperature"),
        ("/set temperature hot", "a number"),
        ("/set temperature nan", "temperature"),
        ("/set temperature -1", "temperature"),
        ("/set top_k 1.5", "whole number"),
        ("/set temperature_last maybe", "true or false"),
        ("/set max_tokens 0", "max_tokens"),
        ("/set overflow maybe", "overflow"),
        ("/set stop 'open", "quote"),
        ("/set logit_bias 5", "ID=NUMBER"),
        ("/set logit_bias 5=1 9999999=2", "there is no token 9999999"),
        ("/set banned_tokens 3 9999999", "ids go from 0 to 1114111"),
        ("/set allowed_tokens 9999999", "there is no token 9999999"),
        ("/set stop_ids 9999999", "there is no token 9999999"),
        ("/set stop_ids a", "whole number"),
        ("/set stop_loop 8", "stop_loop"),
        ("/set stop_loop 8 1", "stop_loop"),
        ("/set order nonsense", "nonsense"),
    ],
)
def test_set_refuses(line: str, word: str) -> None:
    session, screen, _ = talk(line)
    assert word in screen.said("error")
    assert session.settings == ReplySettings()


def test_every_setting_can_be_typed_as_it_is_shown() -> None:
    samples = {
        "stop": '"###" "\\n\\n" a',
        "overflow": "window",
        "banned_strings": '"as an AI" "\\n\\n"',
        "order": "min_p,temperature",
        "logit_bias": "5=-inf 7=1.5",
        "seed": "12",
        "dry_allowed_length": "3",
        "smoothing_curve": "1.5",
        "dry_base": "1.5",
        "thoughts": "show",
        "negative": '"You are rude."',
    }
    for name in setting_names():
        default = get_setting(ReplySettings(), name)
        text = samples.get(name)
        if text is None:
            if name == "min_temp":
                continue  # only together with max_temp
            text = {"bool": "true", "int": "2", "float": "0.5"}.get(type(default).__name__, "3 4")
        changed = change(ReplySettings(), name, text)
        assert get_setting(changed, name) != default, name
        again = change(ReplySettings(), name, shown(get_setting(changed, name)))
        assert get_setting(again, name) == get_setting(changed, name), name
        assert change(changed, name, "default") == ReplySettings(), name
    assert change(ReplySettings(), "dry_sequence_breakers", "none").sampling.dry_sequence_breakers == ()
    with pytest.raises(UsageError):
        change(ReplySettings(), "min_p", "off")


def test_settings_survive_json() -> None:
    import json

    sampling = SamplingParams(logit_bias={1: -math.inf, 2: 0.5}, allowed_tokens=(1, 2), seed=9)
    settings = ReplySettings(max_tokens=3, stop=("a b", "\n"), stop_ids=(3, 5), stop_loop=(32, 4), sampling=sampling)
    settings = replace(settings, guidance=1.5, negative="rude", thoughts="hide")
    assert ReplySettings.from_json(json.loads(json.dumps(settings.to_json(), allow_nan=False))) == settings
    for wrong in (
        {"colour": "red"},
        {"stop_ids": [True]},
        {"stop_ids": "12"},
        {"stop_loop": [1]},
        {"stop_loop": "8"},
        {"guidance": -1},
    ):
        with pytest.raises(UsageError):
            ReplySettings.from_json(wrong)


def test_sampler_template_tokens_stats() -> None:
    _, screen, _ = talk("/template", "hi", "/sampler", "/template", "/tokens ab", "/tokens", "/stats")
    assert "nothing was said" in screen.said("error")
    for step in SamplingParams().effective_chain():
        assert step in screen.said("table")
    text = "<user>hi\n<assistant>one\n"
    assert screen.said("verbatim") == text + "\n" + " ".join(str(ord(char)) for char in text)
    assert "97  a\n98  b" in screen.said("table") and "3 tokens" in screen.said("table")
    assert "decode tokens per second  96.0" in screen.said("table")


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "a talk.json"
    _, screen, _ = talk("/system S", "a", f"/save {path}", "b", "/save", "/clear", "/load", "c", "/exit")
    assert "saved 2 messages" in screen.said("notice") and "loaded 4 messages" in screen.said("notice")
    before = path.read_bytes()
    _, screen, _ = talk(f"/load {path}", "/clear", "/save", "new", "/save", f"/save {tmp_path / 'other'}", "/save")
    assert screen.said("error").count("this is a new conversation") == 2 and path.read_bytes() == before
    assert screen.said("notice").count("saved 2 messages") == 2
    _, screen, _ = talk("/save", f"/load {tmp_path / 'absent'}", "/load")
    assert screen.said("error").count("which file?") == 2 and "absent" in screen.said("error")


def test_copy() -> None:
    runtime = FakeRuntime(["text\n```py\nx = 1\n```\nmore\n```\ny\n```"])
    _, screen, _ = talk("/copy", "a", "/copy", "/copy 2", "/copy 3", runtime=runtime)
    assert screen.copied == [runtime.replies[0], "y"]
    assert "the last reply has 2" in screen.said("error")


def test_continue() -> None:
    session, screen, _ = talk("/set max_tokens 2", "a", "/continue", runtime=FakeRuntime(["abc", "xyz"]))
    assert session.turns[1].content == "abxy"
    assert "/continue goes on" in screen.said("notice")


def test_an_error_ends_the_reply_not_the_chat() -> None:
    runtime = FakeRuntime([("", UsageError("no")), "fine"])
    session, screen, _ = talk("a", "b", runtime=runtime)
    assert screen.said("error") == "no" and [turn.content for turn in session.turns] == ["b", "fine"]


def test_a_full_context_is_announced_with_the_turns_that_leave() -> None:
    runtime = FakeRuntime(["r" * 60], info=Info(context=200))
    _, screen, _ = talk("the first question", "the second question", "third", "fourth", runtime=runtime)
    warnings = screen.said("warning")
    assert "“the first question”" in warnings and "no longer sees" in warnings
    assert "% full" in warnings
    assert warnings.count("“the first question”") == 1


def test_interrupts_quit_only_in_a_row() -> None:
    session, _, _ = talk(KeyboardInterrupt, "a", KeyboardInterrupt, KeyboardInterrupt, "never")
    assert [turn.content for turn in session.turns] == ["a", "one"]


def test_blank_lines_are_nothing() -> None:
    session, _, _ = talk("", "   ", "\n")
    assert session.turns == ()


def test_the_greeting() -> None:
    screen = Recorder()
    repl.greet(ChatSession(FakeRuntime()), screen)
    start = screen.said("show")
    for part in ("fake-model", "EXL2", "4.25 bits", "context 400", "fp32", "cpu", "3.2 MiB", "0.4 s"):
        assert part in start
    assert "toy" not in screen.said("notice")
    screen = Recorder()
    repl.greet(ChatSession(FakeRuntime(info=Info(name="demo", is_demo=True))), screen)
    assert "toy" in screen.said("notice") and "exl chat FOLDER" in screen.said("notice")
    assert 3 <= screen.said("table").count("try") <= 4
    hostile = Info(name="evil\x1b]0;x\x07\nname", architecture="a\x9b31m")
    screen = Recorder()
    repl.greet(ChatSession(FakeRuntime(info=hostile)), screen)
    assert "\\x1b]0;x\\x07\\x0aname" in screen.said("show") and "\x9b" not in screen.said("show")


def test_commands_see_every_field_of_the_stats() -> None:
    session = ChatSession(FakeRuntime())
    screen = Recorder()
    handle(Conversation(session=session, screen=screen), "/stats")
    for field in dataclasses.fields(session.runtime.stats):
        assert field.name.replace("_", " ") in screen.said("table")
