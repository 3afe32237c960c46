"""Control characters, numbers for people, the input line's little language."""

import io
import sys
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.document import Document

from exl_runtime.chat import status
from exl_runtime.chat.editor import CommandCompleter, LineEditor, assembled, unfinished
from exl_runtime.chat.interrupts import gentle_interrupt
from exl_runtime.chat.screen import PlainScreen
from exl_runtime.console.terminal import Terminal, clean, clean_line, clean_message, state_dir, user_text
from exl_runtime.generation.request import Result


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_nothing_that_steers_a_terminal_survives(text: str) -> None:
    for shown, allowed in ((clean(text), "\n\t"), (clean_line(text), ""), (clean_message(text), "\n")):
        for char in shown:
            code = ord(char)
            assert char in allowed or (code >= 0x20 and not 0x7F <= code <= 0x9F and not 0xD800 <= code < 0xE000)


def test_visible_escapes_and_limits() -> None:
    assert clean_line("a\x1b[31m\n\u202eb") == "a\\x1b[31m\\x0a\\u202eb"
    assert len(clean_line("x" * 1000, 50)) == 50
    assert clean_message("a\nb\x07") == "a\nb\\x07"
    assert clean("日本\r\n\tä\x00") == "日本\n\tä"
    assert user_text("a\udcffb") == "a\ufffdb"


def result(**changes: object) -> Result:
    values = {"text": "", "ids": (), "stop_reason": "eos", "prompt_tokens": 812, "reused_tokens": 640}
    values |= {"generated_tokens": 213, "seconds_prefill": 0.09, "seconds_decode": 2.2}
    return Result(**(values | changes))


def test_status_line() -> None:
    line = status.status_line(result(), 4096)
    assert line == "prompt 812 tok (640 cached) 1.9k t/s · gen 213 tok 96 t/s · ctx [##------] 1k/4.1k"
    bare = status.status_line(
        result(reused_tokens=0, generated_tokens=0, seconds_decode=0.0, seconds_prefill=0.0), 1000
    )
    assert bare == "prompt 812 tok · gen 0 tok · ctx [######--] 812/1k"
    assert "cancel" not in bare and "stopped by you" in status.status_line(result(stop_reason="cancelled"), 4096)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (1949, "1.9k"),
        (9960, "10k"),
        (32768, "33k"),
        (999_600, "1M"),
        (5_770_496, "5.8M"),
    ],
)
def test_counts(number: int, text: str) -> None:
    assert status.count(number) == text


def test_sizes_and_gauge() -> None:
    assert [status.size(n) for n in (5, 1536, 3_400_000, 5 << 30)] == ["5 B", "1.5 KiB", "3.2 MiB", "5.0 GiB"]
    assert status.gauge(0, 100) == "[--------] 0/100" and status.gauge(500, 100) == "[########] 500/100"


def test_a_warning_from_eighty_percent_on() -> None:
    assert status.fullness_warning(result(prompt_tokens=590, generated_tokens=200), 1000, "drop") is None
    assert "oldest turns" in status.fullness_warning(result(prompt_tokens=600, generated_tokens=200), 1000, "drop")
    assert "refused" in status.fullness_warning(result(prompt_tokens=900, generated_tokens=200), 1000, "error")


@pytest.mark.parametrize(
    ("typed", "more", "message"),
    [
        ("hello", False, "hello"),
        ("hello\\", True, None),
        ("hello\\\nworld", False, "hello\nworld"),
        ('"""', True, None),
        ('"""one\n\ntwo', True, None),
        ('"""one\n\ntwo"""', False, "one\n\ntwo"),
        ('"""\none\n"""', False, "one"),
        ('say """this"""', False, 'say """this"""'),
        ("  padded  ", False, "padded"),
    ],
)
def test_lines_that_go_on(typed: str, more: bool, message: str | None) -> None:
    assert unfinished(typed) is more
    if message is not None:
        assert assembled(typed) == message


def completions(text: str) -> list[str]:
    return [found.text for found in CommandCompleter().get_completions(Document(text, len(text)), None)]


def test_completion(tmp_path: Path) -> None:
    assert completions("/re") == ["regen"] and completions("/sa") == ["sampler", "save"]
    assert "temperature" in completions("/set te") and completions("/set temperature ") == []
    assert completions("/help sam") == ["sampler"]
    (tmp_path / "talk.json").touch()
    for command in ("load", "json", "grammar"):
        assert completions(f"/{command} {tmp_path}/ta") == ["lk.json"]
    for text in ("hello", "//re", "/re\n/s", ""):
        assert completions(text) == []


def test_the_simple_editor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('one\\\ntwo\r\n"""a\n\nb"""\nlast'))
    editor = LineEditor()
    assert [editor.read(), editor.read(), editor.read()] == ["one\ntwo", "a\n\nb", "last"]
    with pytest.raises(EOFError):
        editor.read()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("tty", "environment", "options", "styled", "editor"),
    [
        (True, {"TERM": "xterm"}, {}, True, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, {}, False, True),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, {}, True, True),
        (True, {"TERM": "dumb"}, {}, False, False),
        (True, {}, {}, False, False),
        (True, {"TERM": "xterm"}, {"plain": True}, False, False),
        (True, {"TERM": "xterm"}, {"no_color": True}, False, True),
        (False, {"TERM": "xterm"}, {}, False, False),
    ],
)
def test_what_a_terminal_can_do(
    monkeypatch: pytest.MonkeyPatch, tty: bool, environment: dict, options: dict, styled: bool, editor: bool
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: tty  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    found = Terminal.detect(**options)
    assert (found.styled, found.editor, found.interactive) == (styled, editor, tty)


def test_state_lies_where_the_desktop_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_dir() == tmp_path / "exl-runtime"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_dir() == Path.home() / ".local" / "state" / "exl-runtime"


def test_the_first_interrupt_asks_and_the_second_insists() -> None:
    import signal

    asked = []
    with gentle_interrupt(lambda: asked.append(1)) as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted() and asked == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_plain_screen_keeps_replies_apart_from_the_rest() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = PlainScreen(out, err)
    screen.notice("note\x1b[31m")
    screen.warning("w")
    screen.error("e")
    screen.table([("a", "b"), ("long", "c")], title="t")
    reply = screen.reply()
    reply.waiting("reading")
    reply.text("x\x1b[1my")
    reply.finish()
    assert out.getvalue() == "x\x1b[1my\n", "a pipe gets the bytes of the model"
    assert err.getvalue() == "note\\x1b[31m\nwarning: w\nerror: e\nt\n  a     b\n  long  c\n"
    assert not screen.copy("x")


def test_piped_lines_are_one_conversation() -> None:
    from exl_runtime.chat.repl import run_piped
    from exl_runtime.chat.session import ChatSession

    out, err = io.StringIO(), io.StringIO()
    runtime = FakeRuntime(["one", "two\n", "three"])
    session = ChatSession(runtime)
    assert run_piped(session, ["a\n", "\n", "  \n", "/help\r\n", "c"], PlainScreen(out, err), verbose=False) == 3
    assert out.getvalue() == "one\ntwo\nthree\n" and err.getvalue() == ""
    assert [turn.content for turn in session.turns] == ["a", "one", "/help", "two\n", "c", "three"]
