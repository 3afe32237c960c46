"""The same request gives the same text, whatever runs beside it, what the cache holds, and how many threads there are.

With kernels of the CPU bit by bit; the reference sums in torch's order, which may differ by a rounding from shape to
shape, so that it promises the same text only for the same passes.
"""

from collections.abc import Iterator

import pytest
from adapters import shapes_of, write_adapter
from beside import others

import exl_runtime as exl

STORY = "Once upon a time there was a little fox who lived in the north with a hen, a dog and an old map. "
PROMPTS = (STORY * 3, "The capital of France is", STORY + "The fox said", "Name, age: Mira, 3; Tim, 4; Anna, 5; Tim,")
GREEDY = exl.SamplingParams(temperature=0, ignore_eos=True)
DRAWN = exl.SamplingParams(temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
PENALIZED = exl.SamplingParams(
    temperature=0.8, repetition_penalty=1.2, presence_penalty=0.3, dry_multiplier=0.5, seed=3, ignore_eos=True
)
SAMPLING = {"greedy": GREEDY, "drawn": DRAWN, "penalized": PENALIZED}
LENGTH = 24


def opened(backend: str) -> Iterator[exl.Runtime]:
    from conftest import unavailable

    if why := unavailable(backend):
        pytest.skip(why)
    with exl.load("demo", backend=backend, context=500, threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="module", params=["cpu", "reference"])
def rt(request: pytest.FixtureRequest) -> Iterator[exl.Runtime]:
    yield from opened(request.param)


@pytest.fixture(scope="module")
def exact() -> Iterator[exl.Runtime]:
    """A runtime that promises every bit."""
    yield from opened("cpu")


def fresh(rt: exl.Runtime) -> None:
    rt._engine().forget()


def alone(rt: exl.Runtime, prompt: str, sampling: exl.SamplingParams, **options: object) -> tuple[int, ...]:
    fresh(rt)
    return rt.generate(prompt, max_tokens=LENGTH, sampling=sampling, **{"speculate": "off", **options}).ids


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_again_cold_and_on_a_hit(rt, sampling) -> None:
    for prompt in PROMPTS:
        first = alone(rt, prompt, sampling)
        assert alone(rt, prompt, sampling) == first, "cold again"
        if rt.info.backend == "cpu":
            hit = rt.generate(prompt, max_tokens=LENGTH, sampling=sampling, speculate="off")
            assert hit.ids == first and hit.reused_tokens == hit.prompt_tokens - 1


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_alone_in_a_batch_and_beside_others_that_come_and_go(exact, sampling) -> None:
    single = [alone(exact, prompt, sampling) for prompt in PROMPTS]
    fresh(exact)
    together = exact.generate(list(PROMPTS), max_tokens=LENGTH, sampling=sampling, speculate="off")
    assert [result.ids for result in together] == single
    fresh(exact)
    with others(exact, STORY, DRAWN, most=7):
        found = [exact.generate(p, max_tokens=LENGTH, sampling=sampling, speculate="off").ids for p in PROMPTS]
    assert found == single


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_with_and_without_guesses(exact, sampling) -> None:
    guessed = 0
    for prompt in PROMPTS:
        plain = alone(exact, prompt, sampling)
        for _ in range(2):  # the second time whole replies are remembered
            result = exact.generate(prompt, max_tokens=LENGTH, sampling=sampling, speculate="auto")
            assert result.ids == plain
            guessed += result.accepted_tokens
    assert guessed > 0


@pytest.mark.parametrize("options", [{"threads": 2}, {"threads": 3}, {"step_tokens": 17}, {"step_tokens": 2000}])
def test_threads_and_budgets(exact, options) -> None:
    single = [alone(exact, prompt, sampling) for prompt in PROMPTS for sampling in SAMPLING.values()]
    from exl_runtime.ops import native

    with exl.load("demo", backend="cpu", context=500, **{"threads": 1, **options}) as other:
        found = [alone(other, prompt, sampling) for prompt in PROMPTS for sampling in SAMPLING.values()]
    native.set_threads(1)
    assert found == single


def test_with_a_draft_model_and_with_an_adapter(exact, tmp_path) -> None:
    folder = write_adapter(tmp_path / "tale", shapes_of(exact._engine().model), size=0.2)
    exact.load_lora(folder)
    single = [[alone(exact, prompt, DRAWN, lora=lora) for prompt in PROMPTS] for lora in ({}, "tale")]
    exact.unload_lora("tale")
    with exl.load("demo", backend="cpu", context=500, threads=1, draft="demo") as other:
        other.load_lora(folder)
        for lora, wanted in zip(({}, "tale"), single, strict=True):
            results = other.generate(list(PROMPTS), max_tokens=LENGTH, sampling=DRAWN, speculate="draft", lora=lora)
            assert [result.ids for result in results] == wanted
            assert sum(result.drafted_tokens for result in results) > 0


def test_without_a_seed_replies_differ(rt) -> None:
    sampling = exl.SamplingParams(temperature=1.0, ignore_eos=True)
    assert len({alone(rt, PROMPTS[0], sampling) for _ in range(3)}) == 3
