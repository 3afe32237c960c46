"""The whole way from parameters to tokens: exact distributions, frequencies, order, masks, state, seeds, errors."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sampling import exact

from exl_runtime.errors import NonFiniteError, UsageError
from exl_runtime.ops import native
from exl_runtime.ops import sample as kernels
from exl_runtime.sampling import Sampler, SamplingParams, sample_batch
from exl_runtime.sampling.draw import inverse_cdf
from exl_runtime.sampling.order import DEFAULT_ORDER
from exl_runtime.sampling.random import COIN, uniform

GONE = float("-inf")
LOGITS = [0.31, 2.4, -1.7, 1.9, 1.9, -0.6, 0.31, 2.9, -3.2, 1.1]
OFF = {"temperature": 1.0, "min_p": 0.0}
HISTORY = [1, 7, 3, 1, 7]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline itself, also where a kernel would do."""
    monkeypatch.setattr(native, "loaded", lambda: False)


def sampler(seed: int = 1, vocab: int = len(LOGITS), **parameters: object) -> Sampler:
    return Sampler(SamplingParams(**{**OFF, **parameters}), vocab_size=vocab, seed=seed, eos_ids={0})


def draw_many(make: Sampler, count: int, row: list[float] = LOGITS) -> list[int]:
    """How often each token comes, over the tokens of one request that does not look back."""
    logits = torch.tensor(row)
    counts = [0] * len(row)
    for i in range(count):
        counts[make.sample(logits, [], range(i)).id] += 1
    return counts


def draw_over_seeds(count: int, **parameters: object) -> list[int]:
    """How often each token comes first after HISTORY, over many requests."""
    logits = torch.tensor(LOGITS)
    counts = [0] * len(LOGITS)
    for seed in range(count):
        counts[sampler(seed, **parameters).sample(logits, HISTORY, []).id] += 1
    return counts


def cut(filter_: Callable, value: float) -> Callable[[list[float]], list[float]]:
    return lambda x: exact.softmax(exact.kept(x, filter_(x, value)[0]))


def penalised(x: list[float]) -> list[float]:
    y = list(x)
    for token in set(HISTORY):
        y[token] = y[token] / 1.5 if y[token] > 0 else y[token] * 1.5
        y[token] -= 0.3 * HISTORY.count(token) + 0.2
    return exact.softmax(y)


CASES: dict[str, tuple[dict[str, object], Callable[[list[float]], list[float]]]] = {
    "plain": ({}, exact.softmax),
    "temperature": ({"temperature": 0.6}, lambda x: exact.softmax([v / 0.6 for v in x])),
    "dynamic": (
        {"min_temp": 0.4, "max_temp": 1.6},
        lambda x: exact.softmax(exact.dynamic_temperature(x, 0.4, 1.6, 1.0)),
    ),
    "smoothing": (
        {"smoothing_factor": 0.4, "smoothing_curve": 1.5},
        lambda x: exact.softmax(exact.smoothing(x, 0.4, 1.5)),
    ),
    "top_k": ({"top_k": 4}, cut(exact.top_k, 4)),
    "top_p": ({"top_p": 0.7}, cut(exact.top_p, 0.7)),
    "min_p": ({"min_p": 0.1}, cut(exact.min_p, 0.1)),
    "top_a": ({"top_a": 0.5}, cut(exact.top_a, 0.5)),
    "typical_p": ({"typical_p": 0.6}, cut(exact.typical, 0.6)),
    "tfs": ({"tfs": 0.8}, cut(exact.tail_free, 0.8)),
    "epsilon": ({"epsilon_cutoff": 0.04}, cut(exact.epsilon_cutoff, 0.04)),
    "eta": ({"eta_cutoff": 0.2}, cut(exact.eta_cutoff, 0.2)),
    "top_n_sigma": ({"top_n_sigma": 1.0}, cut(exact.top_n_sigma, 1.0)),
    "three cuts": (
        {"top_k": 7, "top_p": 0.95, "min_p": 0.15},
        lambda x: cut(exact.min_p, 0.15)(exact.kept(y := exact.kept(x, exact.top_k(x, 7)[0]), exact.top_p(y, 0.95)[0])),
    ),
    "xtc": ({"xtc_probability": 1.0, "xtc_threshold": 0.15}, cut(exact.xtc, 0.15)),
    "skew": ({"skew": 0.5}, lambda x: exact.skewed(x, 0.5)),
    "bias": ({"logit_bias": {2: 3.0, 7: GONE}}, lambda x: exact.softmax([*x[:2], x[2] + 3, *x[3:7], GONE, *x[8:]])),
    "banned": ({"banned_tokens": (7, 1)}, lambda x: exact.softmax([x[0], GONE, *x[2:7], GONE, *x[8:]])),
    "allowed": ({"allowed_tokens": (0, 3, 8)}, lambda x: exact.softmax(exact.kept(x, {0, 3, 8}))),
    "penalties": (
        {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": 0.2},
        penalised,
    ),
    "dry": ({"dry_multiplier": 1.0}, lambda x: exact.softmax([*x[:3], x[3] - 1.0, *x[4:]])),
    "no_repeat_ngram": ({"no_repeat_ngram_size": 3}, lambda x: exact.softmax([*x[:3], GONE, *x[4:]])),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_the_exact_probabilities(name: str) -> None:
    parameters, oracle = CASES[name]
    row = [float(np.float32(v)) for v in LOGITS]
    looks_back = any(step.looks_back for step in sampler(**parameters).pipeline)
    counts = draw_over_seeds(1500, **parameters) if looks_back else draw_many(sampler(seed=17, **parameters), 3000)
    exact.assert_frequencies(counts, oracle(row))


def test_default_chain_with_many_draws() -> None:
    row = [float(np.float32(v)) for v in LOGITS]
    tempered = [v / 0.8 for v in row]
    p = exact.softmax(exact.kept(tempered, exact.min_p(tempered, 0.05)[0]))
    make = Sampler(SamplingParams(), vocab_size=len(row), seed=99)
    exact.assert_frequencies(draw_many(make, 10_000), p)


def test_frequencies_over_seeds() -> None:
    """The first token of many requests is as well distributed as the tokens of one."""
    exact.assert_frequencies(draw_over_seeds(1500), exact.softmax(LOGITS))


def test_xtc_tosses_its_coin() -> None:
    row = [float(np.float32(v)) for v in LOGITS]
    make = sampler(seed=5, xtc_probability=0.4, xtc_threshold=0.15)
    p_off, p_on = exact.softmax(row), cut(exact.xtc, 0.15)(row)
    exact.assert_frequencies(draw_many(make, 6000), [0.6 * off + 0.4 * on for off, on in zip(p_off, p_on, strict=True)])
    acted = sum(uniform(5, i, COIN) < 0.4 for i in range(6000))
    assert abs(acted - 2400) < 4 * math.sqrt(6000 * 0.24)


@pytest.mark.usefixtures("general")
def test_inverse_cdf_in_index_order() -> None:
    rng = np.random.default_rng(2)
    for size in (1, 2, 255, 256, 257, 3000):
        x = (rng.standard_normal(size) * 4).astype(np.float32)
        x[rng.random(size) < 0.3] = GONE
        x[-1] = 1.0
        p = exact.softmax(x.tolist())
        for u in [0.0, 0.25, 1 - 2.0**-53, *rng.random(30)]:
            token = inverse_cdf(x, float(u))
            if u in (0.0, 1 - 2.0**-53):  # an end of the line: the first or last token that may be drawn at all
                drawable = np.flatnonzero(x >= x.max() - 41)
                assert token == drawable[0 if u == 0.0 else -1]
            else:
                assert token == exact.invert(p, float(u))


def test_rounding_noise_is_never_drawn() -> None:
    x = np.array([-60.0, -40.0, 0.0, -60.0], dtype=np.float32)
    assert inverse_cdf(x, 0.0) == 1  # e^-40 is 4e-18 and may be drawn; e^-60 is under the floor of 1e-18
    assert inverse_cdf(np.array([-60.0, 0.0, -60.0], dtype=np.float32), 0.0) == 1
    assert inverse_cdf(np.array([-60.0, 0.0, -60.0], dtype=np.float32), 1 - 2.0**-53) == 1


@pytest.mark.parametrize(
    "parameters", [{"temperature": 0.8, "min_p": 0.05}, {"temperature": 1.7}, {"min_p": 0.2}, {}, {"temperature": 0}]
)
def test_kernel_and_pipeline_draw_the_same_token(parameters: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever backend `ops.sample` runs on here; then the kernel's own reference."""
    vocab = 2003
    rows = torch.randn(150, vocab, generator=torch.Generator().manual_seed(4)) * 3
    make = sampler(seed=21, vocab=vocab, **parameters)
    ours = {}
    for pretend in (False, True):
        monkeypatch.setattr(native, "loaded", lambda: False)
        if pretend:
            monkeypatch.setattr("exl_runtime.sampling.sampler.native.loaded", lambda: True)
            monkeypatch.setattr(kernels, "_native", lambda logits: False)
        ours[pretend] = [make.sample(row, [], range(i)).id for i, row in enumerate(rows)]
    assert ours[False] == ours[True]


def test_native_kernel_draws_the_same_token(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "cpu":
        pytest.skip("only the native kernels are another implementation")
    rows = torch.randn(300, 4099, generator=torch.Generator().manual_seed(8)) * 3
    for parameters in ({}, {"temperature": 0.8, "min_p": 0.05}, {"temperature": 0}):
        make = sampler(seed=3, vocab=4099, **parameters)
        fused = [make.sample(row, [], range(i)).id for i, row in enumerate(rows)]
        with monkeypatch.context() as patch:
            patch.setattr(native, "loaded", lambda: False)
            assert fused == [make.sample(row, [], range(i)).id for i, row in enumerate(rows)]


def test_order_changes_the_outcome_and_is_honoured() -> None:
    row = [2.0, 1.0, 0.0, -1.0]

    def tokens(**parameters: object) -> set[int]:
        counts = draw_many(sampler(vocab=4, temperature=4.0, min_p=0.3, **parameters), 1500, row)
        return {i for i, seen in enumerate(counts) if seen}

    assert tokens() == {0, 1, 2, 3}  # e^(-3/4) = 0.47: after the temperature all pass
    assert tokens(order=("min_p", "temperature")) == tokens(temperature_last=True) == {0, 1}  # e^-1 = 0.37, e^-2 = 0.14


def test_penalties_after_a_cut_still_find_their_tokens() -> None:
    """Steps that name tokens work on the whole vocabulary, wherever they stand and whatever was cut before."""
    row = [float(np.float32(v)) for v in LOGITS]
    order = ("top_k", "penalties", "logit_bias")
    left = exact.kept(row, exact.top_k(row, 4)[0])
    want = [v + (2.0 if i == 3 else 0.0) - (0.7 if i in (1, 3, 7) else 0.0) for i, v in enumerate(left)]
    parameters = {"top_k": 4, "presence_penalty": 0.7, "logit_bias": {3: 2.0, 2: 50.0}, "order": order}
    assert [step.name for step in sampler(**parameters).pipeline] == ["top_k", "penalties", "logit_bias"]
    exact.assert_frequencies(draw_over_seeds(1500, **parameters), exact.softmax(want))


@pytest.mark.parametrize("order", [(), DEFAULT_ORDER[::-1]])
def test_banned_tokens_never_come_whatever_the_rest(order: tuple[str, ...]) -> None:
    counts = draw_many(
        sampler(seed=3, banned_tokens=(7, 1, 3), top_k=2, logit_bias={7: 100.0}, min_keep=5, skew=0.5, order=order),
        1500,
    )
    assert counts[7] == counts[1] == counts[3] == 0
    assert sum(counts) == 1500


def test_min_tokens_and_ignore_eos() -> None:
    row = [9.0, 0.0, 0.0]  # token 0 ends the text and is all but certain
    logits = torch.tensor(row)
    make = sampler(vocab=3, min_tokens=5)
    assert all(make.sample(logits, [], range(i)).id != 0 for i in range(5))
    assert make.sample(logits, [], range(5)).id == 0
    assert draw_many(sampler(vocab=3, ignore_eos=True), 200, row)[0] == 0
    assert sampler(vocab=3, ignore_eos=True, temperature=0).sample(logits, [], []).id == 1
    for parameters in ({"min_tokens": 1}, {"ignore_eos": True}):
        with pytest.raises(UsageError, match="end tokens are not known"):
            Sampler(SamplingParams(**parameters), vocab_size=3, seed=0)


def test_greedy_is_the_best_after_penalties_and_masks_and_the_lowest_of_equals() -> None:
    logits = torch.tensor(LOGITS)
    assert sampler(temperature=0).sample(logits, [], []).id == 7
    assert sampler(temperature=0, banned_tokens=(7, 1)).sample(logits, [], []).id == 3  # 3 and 4 are equal
    assert sampler(temperature=0, repetition_penalty=3.0).sample(logits, [7, 1], []).id == 3
    everything = sampler(temperature=0, xtc_probability=1, typical_p=0.1, mirostat=2, adaptive_target=0.1, skew=5)
    assert everything.sample(logits, [], []).id == 7


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.tensor(LOGITS)
    want = torch.log_softmax(logits, -1)
    make = sampler(seed=4, temperature=0.5, banned_tokens=(7,), top_k=3, logprobs=4)
    draw = make.sample(logits, [], [])
    assert draw.id != 7 and draw.logprob == pytest.approx(want[draw.id].item(), abs=1e-5)
    assert [token for token, _ in draw.top] == [7, 1, 3, 4]  # 3 and 4 are equal: the lower id first
    assert [value for _, value in draw.top] == pytest.approx([want[t].item() for t, _ in draw.top], abs=1e-5)
    plain = sampler(seed=4).sample(logits, [], [])
    assert plain.logprob is None and plain.top == ()
    assert len(sampler(logprobs=99).sample(logits, [], []).top) == len(LOGITS)


def test_same_seed_same_tokens_whatever_the_batch() -> None:
    """One request alone, and the same one among others, in other places, joined and left by others."""
    rng = torch.Generator().manual_seed(6)
    steps = torch.randn(30, 3, 80, generator=rng) * 2
    kinds = (
        {"temperature": 0.8, "min_p": 0.02},
        {"repetition_penalty": 1.2, "dry_multiplier": 0.8, "xtc_probability": 0.5, "top_p": 0.9},
        {"mirostat": 2, "mirostat_tau": 3.0},
    )

    def alone(which: int) -> list[int]:
        make, generated = sampler(seed=40 + which, vocab=80, **kinds[which]), []
        for step in steps:
            generated.append(make.sample(step[which], [5, 6], generated).id)
        return generated

    want = [alone(which) for which in range(3)]
    makers = [sampler(seed=40 + which, vocab=80, **kinds[which]) for which in range(3)]
    replies: list[list[int]] = [[], [], []]
    at = [0, 0, 0]
    while min(at) < 30:
        order = torch.randperm(3, generator=rng).tolist()
        chosen = [which for which in order if at[which] < 30][: 1 + int(torch.randint(3, (1,), generator=rng))]
        rows = torch.stack([steps[at[which], which] for which in chosen])
        draws = sample_batch([makers[w] for w in chosen], rows, [([5, 6], replies[w]) for w in chosen])
        for which, draw in zip(chosen, draws, strict=True):
            replies[which].append(draw.id)
            at[which] += 1
    assert replies == want
    assert want[0] != [sampler(seed=1, vocab=80).sample(step[0], [], range(i)).id for i, step in enumerate(steps)]


def test_bans_that_leave_nothing_name_themselves() -> None:
    make = sampler(vocab=3, banned_tokens=(0, 1), logit_bias={2: GONE})
    with pytest.raises(UsageError, match=r"banned_tokens, logit_bias"):
        make.sample(torch.zeros(3), [], [])
    make = sampler(vocab=3, allowed_tokens=(0,), min_tokens=2)
    with pytest.raises(UsageError, match=r"allowed_tokens, min_tokens"):
        make.sample(torch.zeros(3), [], [])
    assert make.sample(torch.zeros(3), [], [1, 1]).id == 0


@pytest.mark.parametrize("name", ["banned_tokens", "allowed_tokens", "xtc_exempt_tokens", "logit_bias"])
@pytest.mark.parametrize("amount", [GONE, 1.0])
def test_ids_beyond_the_vocabulary_are_refused(name: str, amount: float) -> None:
    value = {10: amount} if name == "logit_bias" else (10,)
    with pytest.raises(UsageError, match=f"{name}.* 10"):
        sampler(vocab=10, xtc_probability=0.5, **{name: value})


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0}, {"top_p": 0.9}, {"banned_tokens": (0,)}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_are_an_error(parameters: dict[str, object], bad: float) -> None:
    logits = torch.tensor(LOGITS)
    logits[4] = bad
    with pytest.raises(NonFiniteError, match="4"):
        sampler(**parameters).sample(logits, [], [])


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0}, {"top_p": 0.9}])
def test_all_logits_minus_infinity_is_an_error_and_some_are_not(parameters: dict[str, object]) -> None:
    with pytest.raises(NonFiniteError):
        sampler(vocab=4, **parameters).sample(torch.full((4,), GONE), [], [])
    assert sampler(vocab=4, **parameters).sample(torch.tensor([GONE, GONE, -50.0, GONE]), [], []).id == 2


def test_everything_at_once_runs() -> None:
    parameters = {
        "logit_bias": {1: 0.5}, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "penalty_range": 20,
        "penalty_decay": 9, "dry_multiplier": 0.8, "no_repeat_ngram_size": 4, "min_temp": 0.5,
        "max_temp": 1.5, "smoothing_factor": 0.1,
        "top_n_sigma": 3, "top_k": 500, "typical_p": 0.98, "tfs": 0.99, "top_a": 0.01, "top_p": 0.98, "min_p": 0.001,
        "epsilon_cutoff": 1e-5, "eta_cutoff": 1e-5, "xtc_probability": 0.5, "mirostat": 2, "adaptive_target": 0.3,
        "skew": 0.1, "logprobs": 3,
    }  # fmt: skip
    for order in ((), DEFAULT_ORDER[::-1]):
        make, generated = sampler(vocab=1000, order=order, **parameters), []
        rows = torch.randn(40, 1000, generator=torch.Generator().manual_seed(1)) * 3
        for row in rows:
            generated.append(make.sample(row, [1, 2, 3] * 10, generated).id)
        assert len(set(generated)) > 10


def test_wrong_shapes_are_our_bug() -> None:
    with pytest.raises(ValueError, match="shape"):
        sampler().sample(torch.zeros(3), [], [])
    with pytest.raises(ValueError, match="rows"):
        sample_batch([sampler()], torch.zeros(2, len(LOGITS)), [([], [])])
    with pytest.raises(UsageError, match="seed"):
        sampler(seed=-1)
