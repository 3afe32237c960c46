"""Several replies to one prompt: computed once, one seed each, and each as if asked for alone."""

import pytest

import exl_runtime as exl

PROMPT = "Once upon a time there was a little fox who lived in the north with a hen, a dog and an old map. " * 3


@pytest.fixture(scope="module")
def rt():
    with exl.load("demo", context=600, threads=1) as opened:
        yield opened


def drawn(seed: int | None) -> exl.SamplingParams:
    return exl.SamplingParams(temperature=1.0, seed=seed, ignore_eos=True)


def test_samples_equal_single_requests_and_share_the_prompt(rt) -> None:
    samples = rt.generate(PROMPT, n=4, max_tokens=12, sampling=drawn(40))
    length = samples[0].prompt_tokens
    assert samples[0].reused_tokens == 0
    assert [sample.reused_tokens for sample in samples[1:]] == [length - 1] * 3
    assert len({sample.ids for sample in samples}) > 1
    for index, sample in enumerate(samples):
        assert sample.ids == rt.generate(PROMPT, max_tokens=12, sampling=drawn(40 + index)).ids
    assert rt.stats.pages_held == 0


def test_samples_take_no_more_pages_than_they_need(rt) -> None:
    """The full pages of the prompt are one and the same; only what differs has a page of its own."""
    held = []

    def look(ids, logits):
        held.append(rt.stats.pages_held)
        return logits

    long = list(range(20, 20 + 300))
    rt.generate(long, n=4, max_tokens=4, sampling=drawn(1), processors=look)
    assert max(held) == 1 + 4, "one page of 256 tokens shared, the rest of the prompt once for each"


def test_a_batch_of_prompts_gives_a_list_for_each(rt) -> None:
    prompts = ["The capital of France", "The capital of Italy"]
    found = rt.generate(prompts, n=2, max_tokens=6, sampling=[drawn(1), drawn(2**64 - 1)])
    assert [len(samples) for samples in found] == [2, 2]
    assert found[0][1].ids == rt.generate(prompts[0], max_tokens=6, sampling=drawn(2)).ids
    assert found[1][1].ids == rt.generate(prompts[1], max_tokens=6, sampling=drawn(0)).ids
    assert [len(rt.generate(prompts[0], n=1, max_tokens=2)), len(rt.generate(prompts[:1], n=1, max_tokens=2)[0])] == [
        1,
        1,
    ]
    free = rt.generate("Once", n=3, max_tokens=20, sampling=drawn(None))
    assert len({sample.ids for sample in free}) == 3, "without a seed each has its own"


@pytest.mark.parametrize("count", [0, -1, 1.0, True, 5000])
def test_other_numbers_are_refused(rt, count) -> None:
    with pytest.raises(exl.errors.UsageError, match="n is"):
        rt.generate("a", n=count)


@pytest.mark.parametrize("tokens", [0, True, "many", 10**6])
def test_a_budget_is_a_number(tokens) -> None:
    with pytest.raises(exl.errors.UsageError, match="step_tokens"):
        exl.load("demo", step_tokens=tokens)


def test_the_budget_changes_steps_and_not_the_text(rt) -> None:
    steps = []
    for budget in (16, 64):
        with exl.load("demo", context=600, threads=1, step_tokens=budget) as other:
            result = other.generate(PROMPT, max_tokens=8, sampling=drawn(40), speculate="off")
            steps.append(other._engine().stats.steps)
            assert result.ids == rt.generate(PROMPT, max_tokens=8, sampling=drawn(40)).ids
            assert steps[-1] == -(-result.prompt_tokens // budget) + 7
    assert steps[0] > steps[1]
