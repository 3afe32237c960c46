"""Conversations longer than the context over the wire: clients send everything each time, and lose no more for it."""

import pytest
from serving import served

import exl_runtime as exl

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
LONG = "The user's name is Ada. " + "You like short answers, and you never shout. " * 30
CITIES = ("France", "Spain", "Italy", "Germany", "Japan", "China", "Norway", "Sweden", "Poland", "Egypt")


@pytest.mark.parametrize("overflow", ["window", "drop"])
def test_a_client_that_sends_everything_gets_what_a_session_gets(demo, overflow: str) -> None:
    greedy = exl.SamplingParams(temperature=0)
    with exl.load(demo, threads=1, context=1280) as rt:
        chat = exl.ChatSession(rt, LONG, overflow=overflow, sampling=greedy, max_tokens=24)
        said = [chat.send(f"What is the capital of {CITIES[i * i % 7]}?").text for i in range(45)]
        keep = rt.head(chat.messages, rt.render(chat.messages).ids)
        assert keep > 256, "more than a page"
    with exl.load(demo, threads=1, context=1280) as rt, served(rt) as server:
        kept: set[int] = set()
        stream = rt.stream
        rt.stream = lambda **options: kept.add(options.get("keep", 0)) or stream(**options)
        client = openai.OpenAI(base_url=f"{server.root}/v1", api_key="none", max_retries=0)
        messages = [{"role": "system", "content": LONG}]
        for number, expected in enumerate(said):
            messages.append({"role": "user", "content": f"What is the capital of {CITIES[number * number % 7]}?"})
            body = {"overflow": overflow}
            made = client.chat.completions.create(
                model="demo", messages=messages, temperature=0, max_tokens=24, extra_body=body
            )
            assert made.choices[0].message.content == expected
            messages.append({"role": "assistant", "content": expected})
            computed = made.usage.prompt_tokens - made.usage.prompt_tokens_details.cached_tokens
            assert number == 0 or computed < 20
        assert len(rt.render(messages).ids) > 1280
        assert kept == ({keep} if overflow == "window" else {0})


def test_continuing_keeps_the_system_prompt(demo) -> None:
    """In parts or in one go: the same window, which holds on to all of the system prompt."""
    free = exl.SamplingParams(temperature=0.8, seed=2, ignore_eos=True)
    with exl.load(demo, threads=1, context=1280) as rt:
        messages = [{"role": "system", "content": LONG}, {"role": "user", "content": "Tell me a story."}]
        whole = rt.render(messages).ids
        seen: list[int] = []
        stream = rt.stream
        rt.stream = lambda prompt, **options: seen.append(options.get("keep", 0)) or stream(prompt, **options)
        chat = exl.ChatSession(rt, LONG, overflow="window", sampling=free, max_tokens=500)
        chat.send("Tell me a story.")
        known = len(whole) + 500 - 1
        for _ in range(4):
            result = chat.extend()
            # A character that was cut in two may be put together otherwise.
            assert result.prompt_tokens - result.reused_tokens <= 8 and result.dropped_tokens >= 0
        assert result.dropped_tokens > 256 and known < 1280
        assert seen == [0, *[rt.head(messages, whole)] * 4] and seen[-1] > 256
