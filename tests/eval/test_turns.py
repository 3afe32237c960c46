"""The wait for the first token in a growing conversation: counted in tokens, no time is judged."""

import json

import pytest

import exl_runtime as exl
from eval.cli import main
from eval.speed.turns import Turn, facts_of, growth, talk
from exl_runtime.chat.session import ChatSession, ReplySettings
from exl_runtime.errors import UsageError


def test_every_turn_computes_only_what_is_new() -> None:
    with exl.load("demo", context=1024, threads=1) as rt:
        turns = talk(rt, range(10, 2000), turns=10, new=40, reply=4, runs=1)
    assert [turn.number for turn in turns] == list(range(1, 11))
    assert turns[0].computed == 40
    # The last token of a reply was never computed: it comes with the next prompt.
    assert {turn.computed for turn in turns[1:]} == {41}
    assert turns[9].computed <= 1.3 * turns[1].computed


def test_a_chat_computes_no_more_in_turn_10_than_in_turn_2() -> None:
    """Through the template, which sets what was said anew in every turn."""
    computed = []
    with exl.load("demo", context=1024, threads=1) as rt:
        session = ChatSession(
            rt,
            "You are a friendly helper.",
            settings=ReplySettings(max_tokens=24, sampling=exl.SamplingParams(temperature=0)),
        )
        for _ in range(10):
            result = session.send("What is the capital of France?")
            computed.append(result.prompt_tokens - result.reused_tokens)
        assert rt.stats.hit_rate > 0.7
    assert max(computed[2:]) <= 1.3 * computed[1]


def test_what_does_not_fit_is_said() -> None:
    with exl.load("demo", context=256, threads=1) as rt, pytest.raises(UsageError, match="take 300 tokens"):
        talk(rt, range(10, 2000), turns=10, new=20, reply=10, runs=1)


def test_growth_is_of_the_second_turn() -> None:
    turns = [Turn(number=n, prompt=n, computed=1, seconds=s) for n, s in ((1, 9.0), (2, 2.0), (3, 2.5))]
    assert growth(turns) == 1.25 and facts_of(turns, "m", "cpu")["growth"] == 1.25


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["speed", "demo", "--turns", "3", "--prompt", "16", "--generate", "4", "--runs", "1", "--threads", "1"]
    assert main(line) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    facts = json.loads(lines[-1])
    assert [turn["computed"] for turn in facts["turns"]] == [16, 17, 17]
    assert any(line.startswith("turn 3 waits") for line in lines)
    assert main([*line, "--batch", "2"]) != 0
