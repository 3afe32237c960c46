"""Many requests of every kind over HTTP, many of them left by their client: no page, no place in the queue is lost."""

import asyncio
import random
from importlib.util import find_spec

import pytest
from resident import resident
from serving import served, wait_for

import exl_runtime as exl

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
REQUESTS = 100  # 500 were run once: see LOG.md
AT_ONCE = 12
ASKED = ("Hi!", "What is the capital of France?", "Tell me a story about a fox, a hen and a long, cold river.")


def body(rng: random.Random) -> dict:
    """What one request asks for, beyond its prompt."""
    options: dict = {
        "max_tokens": rng.choice((1, 5, 20, 60)),
        "seed": rng.randrange(9),
        "temperature": rng.random() * 1.5,
    }
    kinds: list[dict] = [
        {},
        {"n": 3},
        {"logprobs": True, "top_logprobs": 2},
        {"extra_body": {"guidance_scale": 1.5, "negative_prompt": "Be rude."}},
        {"extra_body": {"banned_strings": ["the"], "stop_loop": [8, 3]}},
        {"extra_body": {"overflow": "window", "ignore_eos": True}, "max_tokens": 300},
        {"extra_body": {"deadline": rng.random() * 0.05 + 0.001}},
        {"extra_body": {"priority": rng.choice((-1, 1))}},
        {"extra_body": {"temprature": 1}},  # refused
    ]
    if find_spec("llguidance") is not None:
        kinds.append({"extra_body": {"guided_choice": ["yes", "no"]}})
        kinds.append({"response_format": {"type": "json_object"}})
    return options | rng.choice(kinds)


async def one(client, rng: random.Random, ends: dict[str, int]) -> None:
    """Ask, and perhaps leave before the answer is there."""
    messages = [{"role": "user", "content": rng.choice(ASKED) * rng.choice((1, 1, 8))}]
    options = {"model": "demo", "messages": messages, **body(rng)}
    patience = rng.random() * 0.5 if rng.random() < 0.3 else 60
    streamed = rng.random() < 0.5

    async def ask() -> str:
        made = await client.chat.completions.create(**options, stream=streamed)
        if not streamed:
            return made.choices[0].finish_reason
        reason, left = None, rng.randrange(20) if rng.random() < 0.3 else None
        async for chunk in made:
            if left is not None and (left := left - 1) < 0:
                await made.close()
                return "left"
            reason = chunk.choices[0].finish_reason or reason
        return reason

    try:
        end = await asyncio.wait_for(ask(), patience)
    except asyncio.TimeoutError:
        end = "left"
    except openai.APIStatusError as err:
        end = str(err.status_code)
    ends[end] = ends.get(end, 0) + 1


def crowd(root: str, seed: int, amount: int) -> dict[str, int]:
    """So many requests, a dozen at a time; how they ended."""

    async def run() -> dict[str, int]:
        rng, ends, room = random.Random(seed), {}, asyncio.Semaphore(AT_ONCE)
        async with openai.AsyncOpenAI(base_url=f"{root}/v1", api_key="any", max_retries=0, timeout=120) as client:

            async def in_turn(own: random.Random) -> None:
                async with room:
                    await one(client, own, ends)

            await asyncio.gather(*(in_turn(random.Random(rng.random())) for _ in range(amount)))
        return ends

    return asyncio.run(run())


def test_a_crowd_of_which_many_leave_leaves_nothing_behind(caplog) -> None:
    with exl.load("demo", context=400, threads=1) as runtime, served(runtime, parallel=6, queue=40) as serving:
        crowd(serving.root, 1, REQUESTS)  # what is made once is made now, and the cache is touched
        wait_for(lambda: not serving.desk.pending)
        before = resident()
        ends = crowd(serving.root, 2, REQUESTS)
        wait_for(lambda: not serving.desk.pending and not runtime.stats.running)
        assert sum(ends.values()) == REQUESTS and {"stop", "length", "left", "400"} <= set(ends), ends
        assert set(ends) <= {"stop", "length", "left", "400"}, ends
        stats = runtime.stats
        assert (stats.pages_held, stats.waiting) == (0, 0)
        runtime._engine().table.check()
        assert resident() - before < 20 * 2**20
        assert (
            "Oslo"
            in runtime.generate([{"role": "user", "content": "What is the capital of Norway?"}], max_tokens=20).text
        )
