"""Template variables in the chat: /set, what the model is asked with, what is a thought, and what is kept."""

import json
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime, Rendered
from talking import Recorder, Typist

from exl_runtime.chat import repl
from exl_runtime.chat.history import read
from exl_runtime.chat.session import ChatSession
from exl_runtime.chat.settings import ReplySettings, change, get_setting
from exl_runtime.errors import SessionError, UsageError
from exl_runtime.tokenizer.template import ChatTemplate

SOURCE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is not false %}<think>{% else %}<think></think>{% endif %}{% endif %}"
)
REPLY = "so it is four</think>Four."


class Thinker(FakeRuntime):
    """Asked through a template that lets it think unless it is told not to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.template = ChatTemplate.from_text(SOURCE)

    def render(self, messages, add_generation_prompt=True, *, template_args=None):
        text = self.template.render(messages, add_generation_prompt=add_generation_prompt, template_args=template_args)
        return Rendered(text, tuple(map(ord, text)))


def talk(*lines: str, replies: tuple[str, ...] = (REPLY,)):
    screen, runtime = Recorder(), Thinker(list(replies))
    session = ChatSession(runtime)
    repl.run(session, screen, Typist(*lines))
    return session, screen


def test_set_and_what_the_model_is_asked_with() -> None:
    session, screen = talk("a", "/set template.enable_thinking off", "b", "/set template.enable_thinking default", "c")
    assert [asked[1].get("template_args") for asked in session.runtime.seen] == [None, {"enable_thinking": False}, None]
    said = screen.said("notice")
    assert "template.enable_thinking = false" in said
    assert "template.enable_thinking is not set: the template decides" in said
    assert not screen.said("warning") and session.settings == ReplySettings()


def test_both_ways_to_write_it_and_the_lists() -> None:
    _, screen = talk("/set", "/set Template.enable_thinking=true", "/set template.enable_thinking", "/set")
    first, second = (text for kind, text in screen.lines if kind == "table")
    assert "\ntemplate.enable_thinking  not set" in first and "\ntemplate.enable_thinking  true" in second
    assert screen.said("show") == "template.enable_thinking = true"
    _, screen = talk("a", "/set template.enable_thinking off", "/template")
    assert "template.enable_thinking  false" in screen.said("table")
    _, screen = talk("/set template.enable_thinking off", "a", "/undo", "/template", replies=("Four.",))
    assert screen.said("error"), "nothing was said"


def test_template_shows_the_prompt_as_it_is_asked() -> None:
    session, screen = talk("a", "/set template.enable_thinking off", "b", "/template", replies=("x</think>y", "z"))
    asked = session.runtime.render(session.messages, False, template_args={"enable_thinking": False})
    assert asked.text in screen.said("verbatim")


def test_what_is_a_thought_depends_on_it() -> None:
    _, screen = talk("a")
    assert screen.text == "Four.\n" and "thought for 4 words" in screen.said("notice")
    _, screen = talk("/set template.enable_thinking off", "a", replies=("Four, and no doubt.",))
    assert screen.text == "Four, and no doubt.\n" and "thought for" not in screen.said("notice")
    _, screen = talk("a", "/set template.enable_thinking off", "b", replies=(REPLY, "Five."))
    assert screen.text == "Four.\nFive.\n"


def test_a_reply_that_goes_on_and_one_that_is_led_away() -> None:
    session, _ = talk(
        "/set template.enable_thinking off",
        "/set max_tokens 3",
        "a",
        "/set max_tokens 9",
        "/continue",
        replies=("abcdef",),
    )
    prompt = "".join(map(chr, session.runtime.seen[-1][0]))
    assert prompt == "<user>a\n<assistant><think></think>abc"
    assert "template_args" not in session.runtime.seen[-1][1], "token ids are not rendered"
    session, _ = talk("/system Hi.", "/set template.enable_thinking off", "/set guidance 1.5", "a")
    negative = session.runtime.seen[-1][1]["negative_prompt"]
    assert "".join(map(chr, negative)) == "<user>a\n<assistant><think></think>"


def test_a_name_without_effect_is_told_and_not_sent() -> None:
    session, screen = talk("/set template.enable_thinkng off", "a")
    assert "never mentions the variable enable_thinkng" in screen.said("warning")
    assert screen.said("warning").count("enable_thinkng") == 1
    assert session.settings.template_args == {"enable_thinkng": False}, "another model may read it"
    assert "template_args" not in session.runtime.seen[-1][1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set template.messages x", "cannot be set"),
        ("/set template.bos_token x", "cannot be set"),
        ("/set template.enable-thinking off", "is no name"),
        ("/set template. off", "is no name"),
        ("/set template off", "there is no setting"),
    ],
)
def test_refused(line: str, said: str) -> None:
    session, screen = talk(line)
    assert said in screen.said("error") and session.settings == ReplySettings()


def test_every_value_can_be_typed_as_it_is_shown() -> None:
    for text, value in (("off", False), ("high", "high"), ("3", 3), ('["a", null]', ["a", None]), ('"off"', "off")):
        settings = change(ReplySettings(), "template.x", text)
        assert get_setting(settings, "template.x") == value and settings.template_args == {"x": value}
    assert change(settings, "template.X", "1").template_args == {"x": "off", "X": 1}, "case matters"
    assert ReplySettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(UsageError, match="template_args"):
        ReplySettings.from_json({"template_args": [1]})


def test_kept_with_the_conversation(tmp_path: Path) -> None:
    runtime, path = Thinker([REPLY]), tmp_path / "talk.json"
    session = ChatSession(runtime)
    session.keep(path)
    session.send("a")
    assert "template_args" not in read(path).settings, "as earlier versions wrote it"
    session.settings = change(session.settings, "template.enable_thinking", "off")
    session._record._file.abandon()  # killed: the journal has it, the file does not
    again = ChatSession.resume(path, runtime)
    assert again.settings.template_args == {"enable_thinking": False}
    again.send("b")
    assert runtime.seen[-1][1]["template_args"] == {"enable_thinking": False}
    again.close()
    assert ChatSession.load(path, runtime).settings.template_args == {"enable_thinking": False}
    document = json.loads(path.read_text())
    document["settings"]["template_args"] = {"messages": 1}
    path.write_text(json.dumps(document))
    with pytest.raises(SessionError, match="cannot be set"):
        ChatSession.load(path, runtime)


def test_a_model_that_does_not_read_it_is_told_at_the_start() -> None:
    screen, runtime = Recorder(), Thinker()
    repl.greet(ChatSession(runtime, settings=ReplySettings(template_args={"mood": 1})), screen)
    assert "never mentions the variable mood" in screen.said("warning")
