"""Guidance in a conversation: the prompt a reply is led away from, and what becomes of it as the conversation grows."""

import pytest
from fake_runtime import FakeRuntime, Info
from talking import Recorder, Typist

import exl_runtime as exl
from exl_runtime.chat import repl
from exl_runtime.chat.session import ChatSession
from exl_runtime.chat.settings import ReplySettings

GREEDY = exl.SamplingParams(temperature=0)


def talk(*lines: str, context: int = 4000, replies: tuple[str, ...] = ("hello",)):
    screen, runtime = Recorder(), FakeRuntime(list(replies), info=Info(context=context))
    session = ChatSession(runtime)
    repl.run(session, screen, Typist(*lines))
    return runtime, screen


def led(runtime: FakeRuntime, index: int = -1) -> tuple[float, str] | None:
    """Guidance and the other prompt as text; None where there is none."""
    options = runtime.seen[index][1]
    if "negative_prompt" not in options:
        return None
    return options["guidance"], runtime.tokenizer.decode(options["negative_prompt"])


def test_the_same_conversation_under_another_system_prompt() -> None:
    runtime, screen = talk("/system Be kind.", "/set guidance 1.5", '/set negative "Be rude."', "a", "b")
    assert led(runtime) == (1.5, "<system>Be rude.\n<user>a\n<assistant>hello\n<user>b\n<assistant>")
    assert runtime.seen[-1][0][0] == {"role": "system", "content": "Be kind."}
    assert "guidance = 1.5" in screen.said("notice") and "negative = Be rude." in screen.said("notice")


def test_without_a_text_it_is_no_system_prompt_and_without_either_nothing() -> None:
    runtime, _ = talk(
        "/system Be kind.", "/set guidance 2", "a", "/system none", "b", "/set guidance 1", "/system x", "c"
    )
    assert led(runtime, 0) == (2.0, "<user>a\n<assistant>")
    assert led(runtime, 1) is None, "there is nothing to be led away from"
    assert led(runtime, 2) is None


def test_a_reply_that_goes_on_is_led_away_from_its_own_beginning_too() -> None:
    runtime, _ = talk(
        "/set guidance 2", "/set negative x", "/set max_tokens 3", "a", "/continue", replies=("hello", "lo")
    )
    assert led(runtime) == (2.0, "<system>x\n<user>a\n<assistant>hel")


def test_oldest_turns_leave_the_other_prompt_where_it_has_no_room() -> None:
    lines = [f"message number {number} of the user" for number in range(12)]
    runtime, screen = talk("/set guidance 2", "/set negative x", "/set max_tokens 200", *lines, context=600)
    assert not screen.said("error")
    for index in range(len(lines)):
        _, text = led(runtime, index)
        assert len(text) + 200 <= 600 and text.startswith("<system>x\n<user>"), "it has to fit beside the reply"
        assert text.endswith(f"<user>{lines[index]}\n<assistant>")


def test_wrong_values() -> None:
    _, screen = talk("/set guidance 1000", "/set guidance much", "/set negative")
    assert "guidance is 1000" in screen.said("error") and "must be a number" in screen.said("error")
    assert "negative = none" in screen.said("show")


def test_settings_without_effect_say_so() -> None:
    _, screen = talk("/set negative Be rude.")
    assert "/set guidance 1.5" in screen.said("notice")
    _, screen = talk("/set guidance 1.5")
    assert "without the system prompt" in screen.said("notice") and "/set negative" in screen.said("notice")
    _, screen = talk("/set guidance 1.5", "/set negative x", "/set guidance 2")
    assert "takes effect" not in screen.said("notice") and screen.said("notice").count("/set negative") == 1


@pytest.fixture(scope="module")
def rt():
    with exl.load("demo", context=512, threads=1) as runtime:
        yield runtime


def test_the_demo_says_what_the_runtime_says_under_the_same_two_prompts(rt) -> None:
    settings = ReplySettings(sampling=GREEDY, guidance=3.0, negative="You tell stories.", max_tokens=24)
    chat = ChatSession(rt, system="You are brief.", settings=settings)
    plain = ChatSession(rt, system="You are brief.", sampling=GREEDY, max_tokens=24)
    said = [
        (chat.send(text).text, plain.send(text).text) for text in ("Tell me a story.", "What is the capital of Italy?")
    ]
    for index in (1, 3):
        messages = chat.messages[: index + 1]
        other = [{"role": "system", "content": "You tell stories."}, *messages[1:]]
        wanted = rt.generate(messages, max_tokens=24, sampling=GREEDY, negative_prompt=other, guidance=3.0)
        assert chat.messages[index + 1]["content"] == wanted.text
    assert any(a != b for a, b in said), "and it makes a difference"
    before = chat.messages[-1]["content"]
    chat.settings = ReplySettings(sampling=GREEDY, guidance=3.0, negative="You tell stories.", max_tokens=5)
    chat.regenerate()
    chat.settings = settings
    chat.extend()
    assert chat.messages[-1]["content"][: len(before)] == before[: len(chat.messages[-1]["content"])]
    assert rt.stats.pages_held == 0
