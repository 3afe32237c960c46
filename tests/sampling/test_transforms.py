"""Every transform against its definition in float64 (exact.py) and, where there is one, Hugging Face's processor."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sampling import exact

from exl_runtime.sampling import ranked, transforms

GONE = float("-inf")


def row(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def survivors(x: np.ndarray) -> set[int]:
    return set(np.flatnonzero(x > GONE).tolist())


grid = st.integers(-6, 6).map(lambda i: i / 2)  # few values: ties are the rule
smooth = st.floats(-12, 12, width=32)
logits = (
    st.lists(st.one_of(grid, st.just(GONE)), min_size=1, max_size=12) | st.lists(smooth, min_size=1, max_size=12)
).filter(lambda values: max(values) > GONE)

CUTS: dict[str, tuple[Callable, Callable, st.SearchStrategy[float]]] = {
    "top_k": (ranked.top_k, exact.top_k, st.integers(1, 14)),
    "top_p": (ranked.top_p, exact.top_p, st.floats(0.01, 0.999)),
    "typical": (ranked.typical, exact.typical, st.floats(0.01, 0.999)),
    "tail_free": (ranked.tail_free, exact.tail_free, st.floats(0.01, 0.999)),
    "min_p": (transforms.min_p, exact.min_p, st.floats(0.001, 1)),
    "top_a": (transforms.top_a, exact.top_a, st.floats(0.001, 1)),
    "epsilon_cutoff": (transforms.epsilon_cutoff, exact.epsilon_cutoff, st.floats(0.0001, 0.9)),
    "eta_cutoff": (transforms.eta_cutoff, exact.eta_cutoff, st.floats(0.0001, 0.9)),
    "top_n_sigma": (transforms.top_n_sigma, exact.top_n_sigma, st.floats(0.1, 4)),
    "xtc": (transforms.xtc, exact.xtc, st.floats(0.02, 0.5)),
}


@pytest.mark.parametrize("name", CUTS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), values=logits, keep=st.sampled_from([1, 1, 2, 5]))
def test_cut_keeps_exactly_the_defined_set(name: str, data: st.DataObject, values: list[float], keep: int) -> None:
    ours, oracle, parameter = CUTS[name]
    value = data.draw(parameter)
    x = row(values)
    before = x.copy()
    stays, margin = oracle([float(v) for v in x], value, keep)
    assume(margin > 1e-4)
    out = ours(x, value, keep)
    assert survivors(out) == stays
    assert np.array_equal(x, before)
    assert out.dtype == np.float32 and out.shape == x.shape
    for i in stays:
        assert out[i] == x[i]


@pytest.mark.parametrize("name", CUTS)
def test_cut_on_a_real_size_vocabulary(name: str) -> None:
    ours, oracle, _ = CUTS[name]
    value = {"top_k": 40, "top_n_sigma": 2.0, "xtc": 0.01, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4}.get(name, 0.9)
    for seed, quantised in ((0, False), (1, True)):
        x = (np.random.default_rng(seed).standard_normal(5000) * 3).astype(np.float32)
        if quantised:  # logits of a half-precision head: many ties
            x = np.round(x * 4).astype(np.float32) / 4
        stays, margin = oracle(x.tolist(), value)
        assert margin > 1e-7
        assert survivors(ours(x, value)) == stays


def test_top_p_is_the_smallest_set_and_splits_ties_by_id() -> None:
    assert survivors(ranked.top_p(row([0, 0, 0, 0]), 0.5)) == {0, 1}
    assert survivors(ranked.top_p(row([0, 0, 0, 0]), 0.51)) == {0, 1, 2}
    assert survivors(ranked.top_p(row([0, 5, 0, 0]), 0.2)) == {1}
    assert survivors(ranked.top_p(row([1, 2, 3]), 1.0)) == {0, 1, 2}


@settings(max_examples=100, deadline=None)
@given(values=logits, mass=st.floats(0.01, 0.999))
def test_top_p_property(values: list[float], mass: float) -> None:
    x = row(values)
    p = exact.softmax([float(v) for v in x])
    stays = survivors(ranked.top_p(x, mass))
    total = math.fsum(p[i] for i in stays)
    assert total >= mass - 1e-6
    assert total - min(p[i] for i in stays) < mass + 1e-6  # one fewer would not do


def test_thresholds_never_separate_equals() -> None:
    uniform = row([2.0] * 50)
    for cut in (transforms.epsilon_cutoff, transforms.eta_cutoff):
        assert survivors(cut(uniform, 0.5)) == set(range(50))
    assert survivors(transforms.min_p(uniform, 1.0)) == set(range(50))
    assert survivors(ranked.top_k(uniform, 3)) == {0, 1, 2}


def test_extremes_survive() -> None:
    lone = row([GONE, 3.0, GONE])
    wide = row([1e4, -1e30, 0.0, -1e4])
    for x in (lone, wide, row([0.0])):
        best = int(x.argmax())
        for name, (ours, _, _) in CUTS.items():
            out = ours(x, {"top_k": 1, "top_n_sigma": 0.5}.get(name, 0.3))
            assert best in survivors(out), name
        for shape in (
            partial(transforms.dynamic_temperature, low=0.0, high=2.0, exponent=1.0),
            partial(transforms.smoothing, factor=0.3, curve=3.0),
            partial(ranked.skew, amount=-1.0),
        ):
            out = shape(x)
            assert not np.isnan(out).any() and int(out.argmax()) == best and survivors(out) <= survivors(x)


@settings(max_examples=100, deadline=None)
@given(values=logits, k=st.integers(1, 12))
def test_kth_largest_and_ranking(values: list[float], k: int) -> None:
    x = row(values)
    assert transforms.kth_largest(x, min(k, x.size)) == np.sort(x)[::-1][min(k, x.size) - 1]
    assert ranked.ranking(x).tolist() == exact.best_first(x.tolist())


def test_kth_largest_takes_the_short_way() -> None:
    x = np.random.default_rng(3).integers(0, 500, 10_007).astype(np.float32)
    for k in (1, 2, 7, 19):
        assert transforms.kth_largest(x, k) == np.sort(x)[::-1][k - 1]


@settings(max_examples=100, deadline=None)
@given(values=logits, low=st.floats(0, 1), extra=st.floats(0.1, 2), exponent=st.floats(0.3, 3))
def test_dynamic_temperature(values: list[float], low: float, extra: float, exponent: float) -> None:
    x = row(values)
    out = transforms.dynamic_temperature(x, low, low + extra, exponent)
    want = exact.softmax(exact.dynamic_temperature(x.tolist(), low, low + extra, exponent))
    assert np.allclose(exact.softmax(out.tolist()), want, atol=2e-4)


@settings(max_examples=100, deadline=None)
@given(values=logits, factor=st.floats(0.01, 5), curve=st.floats(1, 5))
def test_smoothing(values: list[float], factor: float, curve: float) -> None:
    x = row(values)
    out = transforms.smoothing(x, factor, curve)
    assert survivors(out) == survivors(x)
    assert np.allclose(
        exact.softmax(out.tolist()), exact.softmax(exact.smoothing(x.tolist(), factor, curve)), atol=1e-4
    )


@settings(max_examples=100, deadline=None)
@given(values=logits, amount=st.floats(-2, 2))
def test_skew(values: list[float], amount: float) -> None:
    x = row(values)
    assert np.allclose(exact.softmax(ranked.skew(x, amount).tolist()), exact.skewed(x.tolist(), amount), atol=1e-5)


def test_skew_is_what_a_bent_random_number_gives() -> None:
    x = row([0.3, 1.7, -0.4, 0.9])
    order = exact.best_first(x.tolist())
    p = [exact.softmax(x.tolist())[i] for i in order]
    for amount in (0.7, -0.7):
        counts = [0.0] * 4
        steps = 20_000
        for j in range(steps):  # the definition in exllamav2, over an even grid of random numbers
            counts[order[exact.invert(p, ((j + 0.5) / steps) ** math.exp(-amount))]] += 1 / steps
        assert np.allclose(exact.softmax(ranked.skew(x, amount).tolist()), counts, atol=2e-3)


def test_xtc_exempt_tokens_neither_go_nor_count() -> None:
    x = row([2.0, 1.9, 1.8, -3.0])
    assert survivors(transforms.xtc(x, 0.1)) == {2, 3}
    exempt = np.array([False, False, True, False])
    assert survivors(transforms.xtc(x, 0.1, 1, exempt)) == {1, 2, 3}
    assert survivors(transforms.xtc(x, 0.1, 3)) == {0, 1, 2, 3}  # would leave fewer than three


def huggingface() -> list[tuple[str, object, Callable]]:
    processors = pytest.importorskip("transformers.generation.logits_process")
    return [
        ("temperature", processors.TemperatureLogitsWarper(0.7), lambda x: transforms.temperature(x, 0.7)),
        ("top_k", processors.TopKLogitsWarper(17), lambda x: ranked.top_k(x, 17)),
        ("top_p", processors.TopPLogitsWarper(0.83), lambda x: ranked.top_p(x, 0.83)),
        ("top_p keep", processors.TopPLogitsWarper(0.1, min_tokens_to_keep=5), lambda x: ranked.top_p(x, 0.1, 5)),
        ("min_p", processors.MinPLogitsWarper(0.07), lambda x: transforms.min_p(x, 0.07)),
        ("min_p keep", processors.MinPLogitsWarper(0.9, min_tokens_to_keep=4), lambda x: transforms.min_p(x, 0.9, 4)),
        ("typical", processors.TypicalLogitsWarper(0.62), lambda x: ranked.typical(x, 0.62)),
        ("epsilon", processors.EpsilonLogitsWarper(0.004), lambda x: transforms.epsilon_cutoff(x, 0.004)),
        ("eta", processors.EtaLogitsWarper(0.01), lambda x: transforms.eta_cutoff(x, 0.01)),
    ]


def test_same_as_hugging_face() -> None:
    rng = np.random.default_rng(5)
    for name, theirs, ours in huggingface():
        for scale in (0.5, 2.0, 5.0):
            x = (rng.standard_normal((20, 300)) * scale).astype(np.float32)
            want = theirs(torch.zeros(20, 1, dtype=torch.long), torch.from_numpy(x.copy())).numpy()
            for got, expected in zip(map(ours, x), want, strict=True):
                assert np.array_equal(got > GONE, expected > GONE), (name, scale)
                assert np.allclose(got[got > GONE], expected[expected > GONE], rtol=1e-6), (name, scale)
