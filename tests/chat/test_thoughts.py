"""What a model thinks before it answers: dim while it comes, one line afterwards, all of it for who asks."""

from types import SimpleNamespace

import pytest
from fake_runtime import FakeRuntime, Rendered
from rich.console import Console
from talking import Recorder, Typist
from vt import Terminal

from exl_runtime.chat import repl
from exl_runtime.chat.reply import THOUGHT_LINES, StyledReply
from exl_runtime.chat.screen import THEME, StyledScreen
from exl_runtime.chat.session import ChatSession
from exl_runtime.chat.thoughts import splitter_for, thoughts_of
from exl_runtime.tokenizer.reasoning import KNOWN, ReasoningSplitter

THOUGHT = "\n".join(f"step {number} of it" for number in range(9))


class Thinking(FakeRuntime):
    """Its template may open the thoughts itself."""

    opens = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.template = SimpleNamespace(sources={"default": "... <think> ... </think> ..."})

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> Rendered:
        whole = super().render(messages, add_generation_prompt)
        text = whole.text + ("<think>\n" if self.opens and add_generation_prompt else "")
        return Rendered(text, tuple(map(ord, text)))


def console_on(terminal: Terminal) -> Console:
    return Console(
        file=terminal,
        force_terminal=True,
        color_system="truecolor",
        width=terminal.columns,
        height=len(terminal.rows),
        theme=THEME,
    )


def shown(text: str, *, fold: bool, size: int, inside: bool = False) -> tuple[list[str], list[list[str]]]:
    """What stands on a screen in the end, and after every frame."""
    terminal = Terminal(60, 14)
    reply = StyledReply(console_on(terminal), clock=iter(range(10**6)).__next__)
    reply.expect_thoughts(ReasoningSplitter(KNOWN[0], inside=inside), fold=fold)
    frames = []
    for start in range(0, len(text), size):
        reply.text(text[start : start + size])
        frames.append(list(terminal.everything))
    reply.finish()
    return list(terminal.everything), frames


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("inside", [False, True])
def test_thoughts_fold_when_they_are_over(size: int, inside: bool) -> None:
    text = f"{'' if inside else '<think>'}\n{THOUGHT}\n</think>\n\nThe **answer**."
    screen, frames = shown(text, fold=True, size=size, inside=inside)
    assert screen == ["thought for 36 words (/think shows them)", "", "The answer."]
    if size == 7:
        live = [frame for frame in frames if frame and frame[0] == "thinking …"]
        assert live and max(map(len, live)) == 1 + THOUGHT_LINES
        assert not any("think>" in row for frame in frames for row in frame)
    screen, _ = shown(text, fold=False, size=size, inside=inside)
    assert screen == [*THOUGHT.split("\n"), "", "The answer."]


def test_thoughts_are_dim_and_answers_are_not() -> None:
    written: list[str] = []
    terminal = Terminal(60, 10)
    feed = terminal.feed
    terminal.feed = lambda text: (written.append(text), feed(text))  # type: ignore[method-assign]
    reply = StyledReply(console_on(terminal))
    reply.expect_thoughts(ReasoningSplitter(KNOWN[0], inside=False), fold=False)
    reply.text("<think>quietly</think>loud")
    reply.finish()
    everything = "".join(written)
    assert "\x1b[2mquietly" in everything and "\x1b[2mloud" not in everything


def test_thoughts_that_broke_off_and_replies_without() -> None:
    assert shown("<think>so it", fold=True, size=3)[0] == ["thought for 2 words (/think shows them)"]
    assert shown("No <think> here.", fold=True, size=4)[0] == ["No <think> here."]
    assert shown("<thin", fold=True, size=1)[0] == ["<thin"]


def talk(runtime: FakeRuntime, *lines: str, screen: object = None) -> tuple[ChatSession, object]:
    screen = screen or Recorder()
    session = ChatSession(runtime, max_tokens=500)
    repl.run(session, screen, Typist(*lines))
    return session, screen


def test_think_shows_the_thoughts_of_the_last_reply() -> None:
    session, screen = talk(
        Thinking(["<think>aha</think>Yes.", "No."]), "/think", "hi", "/think", "ho", "/think", "/think x"
    )
    assert screen.said("verbatim") == "aha"
    assert screen.said("error").count("no thoughts") == 2 and "neither fold nor show" in screen.said("error")
    assert session.turns[1].content == "<think>aha</think>Yes.", "what was said is kept as it was"
    _, screen = talk(FakeRuntime(["<think>aha</think>Yes."]), "hi", "/think")
    assert "no thoughts" in screen.said("error"), "a model without a template"


@pytest.mark.parametrize("opens", [False, True])
def test_in_a_conversation(opens: bool) -> None:
    runtime = Thinking([f"{'' if opens else '<think>'}one two</think>Yes.", "a b c"])
    runtime.opens = opens
    terminal = Terminal(80, 40)
    screen = StyledScreen(console_on(terminal))
    talk(runtime, "hi", "/think show", "/regen", screen=screen)
    rows = terminal.everything
    assert "thought for 2 words (/think shows them)" in rows and "Yes." in rows
    assert not any("think>" in row for row in rows)
    assert thoughts_of(runtime, runtime_reply(opens)) == "one two"


def runtime_reply(opens: bool) -> str:
    return f"{'' if opens else '<think>'}one two</think>Yes."


def test_a_reply_that_goes_on_amid_its_thoughts_or_behind_them() -> None:
    runtime = Thinking()
    amid = splitter_for(runtime, "<think>on")
    assert amid is not None and amid.push("e</think>Yes") == [("reasoning", "e"), ("content", "Yes")]
    behind = splitter_for(runtime, "<think>one</think>Ye")
    assert behind is not None and behind.push("s <think>") == [("content", "s <think>")]
    runtime.opens = True
    inside = splitter_for(runtime)
    assert inside is not None and inside.push("one</think>Yes")[-1] == ("content", "Yes")
    assert splitter_for(FakeRuntime()) is None
