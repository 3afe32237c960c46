"""A conversation of the demo model that outgrows its context: what the system prompt says is not forgotten."""

import pytest

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
