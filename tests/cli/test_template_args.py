"""--template-arg of `exl run`, `chat` and `serve`, on the demo model with a template that reads a variable."""

import argparse
import io
import json
import sys
from pathlib import Path

import pytest

from exl_runtime.chat.settings import ReplySettings
from exl_runtime.cli import chat, main, serve

SOURCE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% if enable_thinking is false %}The capital {% endif %}{% endif %}"
)
QUESTION = "What is the capital of France?"
OFF = ("--template-arg", "enable_thinking=off")


def exl(*words: str) -> int:
    return main.guarded(main.main, [words[0], "demo", "--threads", "1", *words[1:]])


@pytest.fixture
def made(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "made.jinja").write_text(SOURCE)
    return "--template", str(tmp_path / "made.jinja")


def prompt_tokens(capsys: pytest.CaptureFixture[str], *options: str) -> int:
    assert exl("run", "-t", "0", "-n", "4", "--json", "-p", QUESTION, *options) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["prompt_tokens"]


def test_run(made: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    plain = prompt_tokens(capsys, *made)
    assert prompt_tokens(capsys, *made, *OFF) > plain
    assert prompt_tokens(capsys, *made, *OFF, "--template-arg", "enable_thinking=true") == plain, "the last one counts"


def test_run_tells_of_names_without_effect(made: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exl("run", *made, "-n", "2", "-p", QUESTION, "--template-arg", "mood=kind") == 0
    err = capsys.readouterr().err
    assert err.count("never mentions the variable mood") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--template-arg", "enable_thinking"), "NAME=VALUE"),
        (("--template-arg", "messages=[]"), "cannot be set"),
        ((*OFF, "--raw"), "needs a chat template"),
    ],
)
def test_refused_before_a_model_is_opened(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exl_runtime.runtime.load", lambda *_, **__: pytest.fail("a model was opened"))
    assert exl("run", "-p", "a", *options) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") <= 2


def test_chat_through_a_pipe(
    made: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {}
    for options in ((), OFF, ("--template-arg", "mood=kind")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
        assert exl("chat", *made, "-t", "0", "-n", "12", *options) == 0
        said[options] = capsys.readouterr()
    assert said[OFF].out != said[()].out
    assert said["--template-arg", "mood=kind"].out == said[()].out
    assert said["--template-arg", "mood=kind"].err.count("never mentions the variable mood") == 1


def test_the_command_line_lies_on_top_of_what_was_kept() -> None:
    parser = argparse.ArgumentParser()
    chat.add(parser)
    saved = ReplySettings(template_args={"a": 1, "b": 2})
    assert chat.overlaid(saved, parser.parse_args([])).template_args == {"a": 1, "b": 2}
    args = parser.parse_args(["--template-arg", "b=[3]", "--template-arg", "c=x"])
    assert chat.overlaid(saved, args).template_args == {"a": 1, "b": [3], "c": "x"}


def test_serve_hands_them_to_the_server(
    made: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    seen = []
    monkeypatch.setattr("exl_runtime.server.run.serve", lambda runtime, settings, *_, **__: seen.append(settings))
    parser = argparse.ArgumentParser()
    serve.add(parser)
    words = ["demo", "--threads", "1", "--port", "0", *made, *OFF, "--template-arg", "mood=kind"]
    assert serve.run(parser.parse_args(words)) == 0
    assert seen[0].template_args == {"enable_thinking": False, "mood": "kind"}
    assert capsys.readouterr().err.count("never mentions the variable mood") == 1
