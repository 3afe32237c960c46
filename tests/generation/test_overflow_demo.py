"""A conversation of the demo model that outgrows its context: what the system prompt says is not forgotten."""

from dataclasses import replace

import pytest
from rolling import question

import exl_runtime as exl

FILLER = "What is the capital of France?"


@pytest.mark.parametrize("name", ["Ada", "Tom"])
def test_a_fact_of_the_system_prompt_outlives_the_context(demo, name: str) -> None:
    with exl.load("demo", threads=1, context=768) as rt:
        chat = exl.ChatSession(
            rt, f"The user's name is {name}.", overflow="window", sampling=exl.SamplingParams(temperature=0)
        )
        known = 0
        while (result := chat.send(FILLER)).dropped_tokens == 0:
            prompt = rt.render(chat.messages[:-1]).ids
            assert result.prompt_tokens - result.reused_tokens == len(prompt) - known
            known = len(prompt) + result.generated_tokens - 1
        assert len(rt.render(chat.messages).ids) > 768
        asked = chat.send("What is my name?")
        assert name in asked.text and asked.dropped_tokens > 0
        # All that was new: the question, what the template puts around it, and the last token of the reply before.
        assert asked.prompt_tokens - asked.reused_tokens < 40


@pytest.mark.parametrize("name", ["Ada", "Tom"])
def test_turns_that_leave_cost_nothing_but_the_new_question(demo, name: str) -> None:
    """Several times over, and the system prompt is not forgotten."""
    greedy = exl.SamplingParams(temperature=0)
    with exl.load("demo", threads=1, context=512) as rt:
        chat = exl.ChatSession(rt, f"The user's name is {name}.", overflow="drop", sampling=greedy)
        head, dropped = len(rt.render([{"role": "system", "content": chat.system or ""}], False).ids), 0
        for number in range(60):
            asked = question(number)
            result = chat.send(asked)
            dropped += result.dropped_turns > 0
            new = len(rt.render([{"role": "user", "content": asked}]).ids)
            # Beside the question the last token of the reply before, which nobody had computed yet.
            assert result.prompt_tokens - result.reused_tokens <= new + (1 if number else head)
            assert result.prompt_tokens <= 512 - 128
        assert dropped > 4 and len(chat.forgotten) > 70
        asked = chat.send("What is my name?")
        assert name in asked.text and asked.prompt_tokens - asked.reused_tokens < 20
        assert rt.stats.pages_held == 0


def test_the_same_conversation_loses_the_same_turns_and_says_the_same(demo) -> None:
    """From cold, and by a client that sends everything each time."""
    texts: list[list[str]] = []
    free = exl.SamplingParams(temperature=0.7, seed=3)
    for whole in (False, True):
        with exl.load("demo", threads=1, context=512) as rt:
            chat = exl.ChatSession(rt, "Be brief.", overflow="drop", max_tokens=40, sampling=free)
            messages, texts_now, turns = [{"role": "system", "content": "Be brief."}], [], []
            for number in range(40):
                asked = {"role": "user", "content": question(number)}
                if whole:
                    messages.append(asked)
                    result = rt.generate(messages, overflow="drop", max_tokens=40, sampling=free)
                    messages.append({"role": "assistant", "content": result.text})
                    turns.append(result.dropped_turns)
                else:
                    result = chat.send(asked["content"])
                texts_now.append(result.text)
                if number:
                    assert result.prompt_tokens - result.reused_tokens < 20, number
            texts.append(texts_now)
    assert texts[0] == texts[1]
    assert 3 < len(set(turns)) < 9, "what left once is enough for several turns"


def test_a_branch_of_a_conversation_that_lost_turns(demo) -> None:
    greedy = exl.SamplingParams(temperature=0)
    with exl.load("demo", threads=1, context=768) as rt:
        chat = exl.ChatSession(rt, "Be brief.", overflow="drop", sampling=greedy)
        number = 0
        while not chat.forgotten:
            chat.send(question(number))
            number += 1
        chat.send(question(number))
        assert chat.regenerate().reused_tokens == chat.turns[-1].meta.prompt_tokens - 1
        chat.goto(1)  # from here on it is told everything, and finds what it had
        assert not chat.forgotten
        result = chat.send(question(number + 1))
        assert result.dropped_turns and result.prompt_tokens - result.reused_tokens < 25
        chat.settings = replace(
            chat.settings, max_tokens=60, sampling=exl.SamplingParams(temperature=0, ignore_eos=True)
        )
        chat.send("Tell me a short story about a fox.")
        before, extended = len(chat.forgotten), 0
        while len(chat.forgotten) == before and extended < 12:
            result, extended = chat.extend(), extended + 1
            assert result.prompt_tokens - result.reused_tokens < 5
        assert result.dropped_turns and len(chat.forgotten) > before
