"""The options of `exl run` and `exl chat` about guesses and about what replies look like, on the demo model."""

import io
import json
import sys
from pathlib import Path

import pytest

from exl_runtime.cli import main

ASK = ("run", "demo", "--threads", "1", "-t", "0", "-p", "What is the capital of France?")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def exl(*words: str) -> int:
    return main.guarded(main.main, list(words))


def test_what_a_reply_looks_like(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "letters.lark").write_text('start: "<" /[a-z]{3}/ ">"')
    for options, holds in (
        (("--json-schema", str(tmp_path / "schema.json")), lambda text: set(json.loads(text)) == {"n"}),
        (("--regex", "[0-9]{4}!"), lambda text: len(text) == 5 and text[:4].isdigit() and text[4] == "!"),
        (("--grammar", str(tmp_path / "letters.lark")), lambda text: len(text) == 5 and text[0] + text[4] == "<>"),
        (("--choice", "yes", "--choice", "no"), lambda text: text in ("yes", "no")),
        (("--ban", "Paris", "--ban", "capital"), lambda text: "Paris" not in text and "capital" not in text),
        (("--prefix", "Well, "), lambda text: text.startswith("Well, ")),
    ):
        assert exl(*ASK, *options) == 0
        assert holds(capsys.readouterr().out.strip()), options


def test_guesses_are_told_in_the_last_event(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for options in (("--speculate", "off"), ("--draft", str(demo), "--speculate", "draft"), ()):
        assert exl(*ASK, "--json", *options) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[0]["ids"] == results[1]["ids"] == results[2]["ids"]
    assert results[0]["drafted_tokens"] == 0 and results[1]["accepted_tokens"] > 0


def test_loops_and_healing(capsys: pytest.CaptureFixture[str]) -> None:
    raw = ("run", "demo", "--threads", "1", "-t", "0", "--raw", "--json", "-p")
    assert exl(*raw, "Once upon a ti", "--heal", "-n", "4") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"].startswith("me")
    assert exl(*raw, "a b a b a b a b a b", "--stop-loop", "8,3", "--ignore-eos", "-n", "400") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stop_reason"] == "loop"


def test_a_token_that_ends_the_reply(capsys: pytest.CaptureFixture[str]) -> None:
    assert exl(*ASK, "--json") == 0
    ids = json.loads(capsys.readouterr().out.splitlines()[-1])["ids"]
    assert exl(*ASK, "--json", "--stop-id", str(ids[3]), "--stop-id", "5") == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (done["ids"], done["stop_reason"]) == (ids[:4], "stop") and "capital of" in done["text"]


def test_led_away_from_another_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    import exl_runtime

    asked, away = "Tell me a story about a fox.", "Tell me a story about a dog."
    tell = (*ASK[:-1], asked, "-n", "24")
    replies = []
    for options in ((), ("--negative-prompt", away, "--guidance", "3"), ("--negative-prompt", away)):
        assert exl(*tell, *options) == 0
        replies.append(capsys.readouterr().out.strip())
    with exl_runtime.load("demo", threads=1) as runtime:
        greedy = {"max_tokens": 24, "sampling": exl_runtime.SamplingParams(temperature=0)}
        messages, other = ([{"role": "user", "content": text}] for text in (asked, away))
        wanted = [runtime.generate(messages, **greedy)]
        wanted += [runtime.generate(messages, **greedy, negative_prompt=other, guidance=by) for by in (3, 1.5)]
    assert replies == [result.text.strip() for result in wanted]
    assert replies[0] != replies[1]


def test_every_reply_of_a_chat_looks_like_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))

    def replies(*options: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\nAnd of Italy?\n"))
        assert exl("chat", "demo", "--threads", "1", "-t", "0", "-n", "24", *options) == 0
        return capsys.readouterr().out.splitlines()

    assert set(replies("--choice", "yes", "--choice", "no")) <= {"yes", "no"}
    (tmp_path / "schema.json").write_text('{"enum": [5, 6]}')
    assert set(replies("--json-schema", str(tmp_path / "schema.json"))) <= {"5", "6"}
    plain = replies()
    assert "Paris" in plain[0] and "Paris" not in replies("--ban", "Paris")[0]
    away = ("--system", "You are brief.", "--negative-prompt", "You tell long stories.")
    assert replies(*away) == replies(*away, "--guidance", "1.5")
    assert replies(*away, "--guidance", "30") != replies(*away, "--guidance", "1") == replies(*away[:2])


def test_help_tells_the_defaults_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    from exl_runtime.cli.chat import DEMO_MAX_TOKENS, DEMO_TEMPERATURE

    assert exl("chat", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"--temperature X default: 0.8, demo {DEMO_TEMPERATURE}" in text and f"demo {DEMO_MAX_TOKENS})" in text
    assert exl("run", "--help") == 0
    assert "--temperature X default: 0.8 " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--json-schema", "absent.json"), "cannot read absent.json"),
        (("--regex", "a", "--choice", "b"), "not allowed with"),
        (("--stop-loop", "8"), "'8' is not N,TIMES"),
        (("--stop-loop", "8,1"), "TIMES is at least 2"),
        (("--stop-id", "x"), "'x' is not a token id"),
        (("--guidance", "2"), "--guidance needs --negative-prompt"),
        (("--guidance", "1", "--negative-prompt", "x"), "give a number above 1"),
        (("--speculate", "much"), "invalid choice"),
        (("--speculate", "draft"), "there is no draft model"),
        (("--draft", "absent"), "there is no folder absent"),
    ],
)
def test_options_that_make_no_sense(options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exl(*ASK, *options) == 2
    assert words in capsys.readouterr().err


def test_scores_of_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        exl("run", "demo", "--threads", "1", "--raw", "--json", "-p", "Once upon a time", "--prompt-logprobs", "2") == 0
    )
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    scores = done["prompt_logprobs"]
    assert len(scores) == done["prompt_tokens"] and scores[0] is None
    assert all(score["logprob"] < 0 and len(score["top"]) == 2 for score in scores[1:])


@pytest.mark.parametrize("special", [False, True])
def test_thoughts_of_a_single_reply(
    special: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from fake_runtime import FakeRuntime
    from marked import MarkedRuntime

    from exl_runtime.cli import run

    def replies(*options: str) -> str:
        plain = FakeRuntime(["<think>\nHm.\n</think>\n\nYes."])
        plain.template = SimpleNamespace(sources={"default": "<think>"})
        runtime = MarkedRuntime(["\ue000\nHm.\n\ue001\n\nYes.\ue002"]) if special else plain
        monkeypatch.setattr(run, "open_runtime", lambda args: runtime)
        assert exl("run", "m", "-p", "q", *options) == 0
        return capsys.readouterr().out

    assert replies("--thoughts", "hide") == "Yes.\n"
    assert replies() == "<think>\nHm.\n</think>\n\nYes.\n"
    done = json.loads(replies("--json").splitlines()[-1])
    assert (done["thoughts"], done["answer"]) == ("Hm.", "Yes.") and done["text"].startswith("<think>")
