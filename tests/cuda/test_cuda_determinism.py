"""What the CUDA backend promises of one request and seed, by emulation, down to the bits of log-probabilities.

A row of a pass has the same bits whatever is beside it while the pass has at most 32 rows and each sequence at most 16
new ones: single tokens and guesses always, whole prompts with step_tokens=16. Longer passes go to other kernels, which
round otherwise; the same passes give the same bits there too.
"""

from collections.abc import Iterator

import pytest
import torch
from beside import others

import exl_runtime as exl
from exl_runtime.ops.attention.choose import DECODE_ROWS

ROWS = 32  # of one pass of the kernels for few rows, ext/cuda/skinny.h
PROMPTS = (
    "Once upon a time there was a little fox who lived in the north with a hen, a dog and an old map.",
    "one two three one two three one two",
    "Mira, 3; Tim,",
)
GREEDY = exl.SamplingParams(temperature=0, ignore_eos=True)
DRAWN = exl.SamplingParams(temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
PENALIZED = exl.SamplingParams(temperature=0.8, repetition_penalty=1.2, dry_multiplier=0.5, seed=3, ignore_eos=True)
SAMPLING = {"greedy": GREEDY, "drawn": DRAWN, "penalized": PENALIZED}
LENGTH = 5
Reply = tuple[tuple[int, ...], tuple[float, ...]]


@pytest.fixture(scope="module")
def rt(emulated) -> Iterator[exl.Runtime]:
    with opened(step_tokens=DECODE_ROWS) as runtime:
        yield runtime


def opened(**options: object) -> exl.Runtime:
    return exl.load("demo", device="cpu", backend="cuda", cache="fp16", context=256, threads=1, **options)


def reply(result: exl.Result) -> Reply:
    assert len(result.ids) == LENGTH
    return result.ids, tuple(entry.logprob for entry in result.logprobs)


def told(rt: exl.Runtime, prompt: str, sampling: exl.SamplingParams, speculate: str = "off") -> exl.Result:
    return rt.generate(prompt, max_tokens=LENGTH, sampling=sampling, speculate=speculate, logprobs=1)


@pytest.fixture(scope="module")
def alone(rt) -> dict[tuple[str, str], Reply]:
    """What each request gets by itself, with nothing in the cache."""
    found = {}
    for name, sampling in SAMPLING.items():
        for prompt in PROMPTS:
            rt._engine().forget()
            found[name, prompt] = reply(told(rt, prompt, sampling))
    return found


@pytest.mark.parametrize("name", SAMPLING)
def test_on_a_cache_hit(rt, alone, name) -> None:
    for prompt in PROMPTS[:2]:
        rt._engine().forget()
        told(rt, prompt, GREEDY)
        hit = told(rt, prompt, SAMPLING[name])
        assert reply(hit) == alone[name, prompt] and hit.reused_tokens == hit.prompt_tokens - 1


@pytest.mark.parametrize("name", SAMPLING)
def test_in_a_batch(rt, alone, name) -> None:
    rt._engine().forget()
    results = rt.generate(list(PROMPTS), max_tokens=LENGTH, sampling=SAMPLING[name], speculate="off", logprobs=1)
    assert [reply(result) for result in results] == [alone[name, prompt] for prompt in PROMPTS]


def test_beside_others_that_come_and_go(rt, alone) -> None:
    rt._engine().forget()
    with others(rt, "Once upon", DRAWN, most=3):
        found = [reply(told(rt, prompt, DRAWN)) for prompt in PROMPTS[:2]]
    assert found == [alone["drawn", prompt] for prompt in PROMPTS[:2]]


@pytest.mark.parametrize("name", SAMPLING)
def test_with_guesses(rt, alone, name) -> None:
    """The second time the whole reply is remembered, and guessed."""
    rt._engine().forget()
    results = [told(rt, PROMPTS[1], SAMPLING[name], speculate="auto") for _ in range(2)]
    assert [reply(result) for result in results] == [alone[name, PROMPTS[1]]] * 2
    assert results[1].accepted_tokens > 0


def test_tokens_drawn_beside_the_model_are_those_drawn_in_it(rt, alone) -> None:
    """Without log-probabilities other code draws."""
    for name in ("greedy", "drawn"):
        result = rt.generate(PROMPTS[2], max_tokens=LENGTH, sampling=SAMPLING[name], speculate="off")
        assert result.ids == alone[name, PROMPTS[2]][0]


def test_in_one_pass_of_the_whole_prompt(rt, alone) -> None:
    """With the usual budget: the same passes give the same bits, and the same text as in pieces."""
    with opened() as other:
        found = []
        for _ in range(2):
            other._engine().forget()
            found.append([reply(told(other, prompt, GREEDY)) for prompt in PROMPTS[:2]])
    assert found[0] == found[1]
    assert [ids for ids, _ in found[0]] == [alone["greedy", prompt][0] for prompt in PROMPTS[:2]]


def test_a_row_beside_as_many_as_the_promise_holds_for(rt) -> None:
    """Both limits, in logits: 32 rows of one pass, 16 of one sequence."""
    from driving import batch_of, new_cache

    from exl_runtime.cache.types import FP16

    model = rt._engine().model
    ids = rt.tokenizer.encode(PROMPTS[0])[:DECODE_ROWS]
    assert len(ids) == DECODE_ROWS
    together = batch_of([(ids, 0, [2]), (ids[::-1], 0, [0])])
    assert len(together.tokens) == ROWS
    whole = model.forward(together, new_cache(model, type=FP16)).clone()
    kv = new_cache(model, type=FP16)
    for row in range(DECODE_ROWS):
        single = model.forward(batch_of([(ids[row : row + 1], row, [2])]), kv)
        assert torch.equal(single[0], whole[row]), row
