"""Penalties against brute force and, where there is one, Hugging Face's processor; masks; the growing history."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import exact

from exl_runtime.sampling import masks, penalties
from exl_runtime.sampling.history import History

GONE = float("-inf")
VOCAB = 5

histories = st.lists(st.integers(0, VOCAB), max_size=40)  # VOCAB itself: a token without a logit
rows = st.lists(st.floats(-6, 6, width=32) | st.just(GONE), min_size=VOCAB, max_size=VOCAB)


def row(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def tokens(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


@settings(max_examples=120, deadline=None)
@given(
    values=rows,
    history=histories,
    repetition=st.floats(0.5, 2),
    frequency=st.floats(-1, 1),
    presence=st.floats(-1, 1),
    reach=st.integers(-1, 12),
    decay=st.integers(0, 8),
)
def test_classic_penalties(
    values: list[float],
    history: list[int],
    repetition: float,
    frequency: float,
    presence: float,
    reach: int,
    decay: int,
) -> None:
    out = penalties.repetition_frequency_presence(
        row(values),
        tokens(history),
        repetition=repetition,
        frequency=frequency,
        presence=presence,
        reach=reach,
        decay=decay,
    )
    for token, value in enumerate(values):
        weights = []
        for back, past in enumerate(reversed(history)):  # back 0: the latest token
            if past != token:
                continue
            if reach < 0 or back < reach:
                weights.append(1.0)
            elif back < reach + decay:
                weights.append(1 - (back - reach + 1) / (decay + 1))
        want = value
        if weights:
            factor = 1 + (repetition - 1) * weights[0]
            want = value / factor if value > 0 else value * factor
            want -= frequency * math.fsum(weights) + presence * weights[0]
        assert out[token] == want or math.isclose(out[token], want, rel_tol=1e-5, abs_tol=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    values=rows,
    history=st.lists(st.integers(0, 2), max_size=40) | histories,
    allowed=st.integers(0, 4),
    longest=st.integers(1, 8),
    reach=st.integers(-1, 20),
    breakers=st.sets(st.integers(0, 4), max_size=2),
)
def test_dry_against_brute_force(
    values: list[float], history: list[int], allowed: int, longest: int, reach: int, breakers: set[int]
) -> None:
    is_breaker = np.zeros(VOCAB + 1, dtype=bool)
    is_breaker[list(breakers)] = True
    out = penalties.dry(
        row(values),
        tokens(history),
        multiplier=0.8,
        base=1.75,
        allowed_length=allowed,
        max_ngram=longest,
        reach=reach,
        breakers=is_breaker,
    )
    window = history[-reach:] if reach > 0 else history
    lengths = exact.dry_lengths(window, allowed, longest, tuple(breakers))
    for token, value in enumerate(values):
        want = value - 0.8 * 1.75 ** (lengths[token] - allowed) if token in lengths else value
        assert out[token] == want or math.isclose(out[token], want, rel_tol=1e-5, abs_tol=1e-5)


def test_dry_against_brute_force_on_long_histories() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(400):
        history = rng.integers(0, 3, rng.integers(10, 60))
        breaker, allowed, longest = int(rng.integers(0, 6)), int(rng.integers(0, 5)), int(rng.integers(1, 9))
        is_breaker = np.arange(VOCAB + 1) == breaker
        lengths = exact.dry_lengths(history.tolist(), allowed, longest, (breaker,))
        hits += bool(lengths)
        want = [-0.5 * 1.5 ** (lengths[t] - allowed) if t in lengths else 0.0 for t in range(VOCAB)]
        out = penalties.dry(
            row([0.0] * VOCAB),
            history,
            multiplier=0.5,
            base=1.5,
            allowed_length=allowed,
            max_ngram=longest,
            breakers=is_breaker,
        )
        assert np.allclose(out, want, rtol=1e-5)
    assert hits > 150


def test_dry_by_hand() -> None:
    x = row([0.0] * 5)
    run = partial(penalties.dry, x, multiplier=1.0, base=2.0, allowed_length=2, max_ngram=20)
    # 1 2 3 was followed by 4; now 1 2 3 again: length 3, so 4 costs 2^(3-2).
    assert run(tokens([1, 2, 3, 4, 0, 1, 2, 3])).tolist() == [0, 0, 0, 0, -2]
    assert run(tokens([4, 3, 0, 1, 3])).tolist() == [0] * 5  # one equal token is under the allowed length
    assert run(tokens([])).tolist() == run(tokens([1])).tolist() == [0] * 5
    heavy = penalties.dry(x, tokens([1] * 900), multiplier=100, base=100, allowed_length=2, max_ngram=1000)
    assert np.isfinite(heavy).all() and heavy[1] < -1e29


@settings(max_examples=120, deadline=None)
@given(values=rows.filter(lambda v: max(v) > GONE), history=histories, size=st.integers(1, 5))
def test_no_repeat_ngram(values: list[float], history: list[int], size: int) -> None:
    out = penalties.no_repeat_ngram(row(values), tokens(history), size)
    grams = {tuple(history[i : i + size]) for i in range(len(history) - size + 1)}
    last = tuple(history[len(history) - size + 1 :])
    want = [GONE if (*last, token) in grams and len(last) == size - 1 else v for token, v in enumerate(values)]
    if max(want) == GONE:
        best = values.index(max(values))
        want[best] = values[best]
    assert np.array_equal(out, row(want))


def test_same_as_hugging_face() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(11)
    for _ in range(30):
        x = rng.standard_normal(40).astype(np.float32)
        history = rng.integers(0, 6, 60)
        ids = torch.from_numpy(history)[None]
        for processor, ours in (
            (
                processors.RepetitionPenaltyLogitsProcessor(1.3),
                penalties.repetition_frequency_presence(x, history, repetition=1.3),
            ),
            (processors.NoRepeatNGramLogitsProcessor(1), penalties.no_repeat_ngram(x, history, 1)),
            (processors.NoRepeatNGramLogitsProcessor(3), penalties.no_repeat_ngram(x, history, 3)),
        ):
            want = processor(ids, torch.from_numpy(x.copy())[None])[0].numpy()
            assert np.array_equal(ours > GONE, want > GONE)
            assert np.allclose(ours[ours > GONE], want[want > GONE], rtol=1e-6)


def test_inputs_are_never_edited() -> None:
    x, history = row([1.0, 2.0, 3.0, 4.0, 5.0]), tokens([1, 2, 1, 2, 1])
    before = x.copy()
    penalties.repetition_frequency_presence(x, history, repetition=2.0)
    penalties.dry(x, history, multiplier=1, base=2, allowed_length=1, max_ngram=9)
    penalties.no_repeat_ngram(x, history, 2)
    masks.ban(x, tokens([1]))
    masks.allow_only(x, tokens([1]))
    masks.bias(x, tokens([1]), np.array([3.0], dtype=np.float32))
    assert np.array_equal(x, before)


def test_masks() -> None:
    x = row([1.0, GONE, 3.0, 4.0])
    assert masks.ban(x, tokens([0, 2])).tolist() == [GONE, GONE, GONE, 4]
    assert masks.allow_only(x, tokens([1, 2])).tolist() == [GONE, GONE, 3, GONE]
    assert masks.bias(x, tokens([1, 3]), np.array([5.0, -1.5], dtype=np.float32)).tolist() == [1, GONE, 3, 2.5]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_history_always_equals_prompt_plus_reply(data: st.DataObject) -> None:
    """Whatever is asked in a row: growing, shrinking, changed and fresh lists, ids beyond the vocabulary."""
    history = History(VOCAB)
    ids = st.lists(st.integers(-1, VOCAB + 2), max_size=6)
    prompt, generated = data.draw(ids), []
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["grow", "grow", "cut", "change", "new prompt", "copy"]))
        if action == "grow":
            generated.extend(data.draw(ids))
        elif action == "cut":
            del generated[len(generated) // 2 :]
        elif action == "change" and generated:
            generated[data.draw(st.integers(0, len(generated) - 1))] = data.draw(st.integers(0, VOCAB))
        elif action == "new prompt":
            prompt = data.draw(ids)
        else:
            prompt, generated = list(prompt), list(generated)
        want = [t if 0 <= t < VOCAB else VOCAB for t in prompt + generated]
        assert history.tokens(prompt, generated).tolist() == want


def test_history_outgrows_its_buffer() -> None:
    history, generated = History(10), []
    for i in range(1000):
        generated.append(i % 10)
        assert history.tokens([1, 2, 3], generated)[-1] == i % 10
    assert history.tokens([1, 2, 3], generated).tolist() == [1, 2, 3, *generated]
