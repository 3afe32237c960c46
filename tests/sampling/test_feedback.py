"""Mirostat and adaptive-p: the whole feedback loop beside ours, in float64 and with the same random numbers."""

import math

import numpy as np
import pytest
import torch
from sampling import exact

from exl_runtime.sampling import Sampler, SamplingParams
from exl_runtime.sampling.random import uniform

GONE = float("-inf")


def sampler(seed: int = 1, *, vocab: int, **parameters: object) -> Sampler:
    return Sampler(SamplingParams(**{"temperature": 1.0, "min_p": 0.0, **parameters}), vocab_size=vocab, seed=seed)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_against_the_definition(version: int) -> None:
    """The whole feedback loop in float64 beside ours, with the same random numbers: the same 150 tokens."""
    rng = np.random.default_rng(version)
    rows = (rng.standard_normal((150, 400)) * 2.5).astype(np.float32)
    tau, eta, mu = 3.0, 0.3, 6.0
    make = sampler(seed=12, vocab=400, mirostat=version, mirostat_tau=tau, mirostat_eta=eta)
    surprises = []
    for i, x in enumerate(rows):
        p = exact.softmax(x.tolist())
        ranked = exact.best_first(x.tolist())
        if version == 2:
            stays = {t for t in ranked if -math.log2(p[t]) <= mu} | {ranked[0]}
        else:
            t = [math.log((j + 2) / (j + 1)) for j in range(99)]
            b = [math.log(p[ranked[j]] / p[ranked[j + 1]]) for j in range(99)]
            s = math.fsum(ti * bi for ti, bi in zip(t, b, strict=True)) / math.fsum(ti * ti for ti in t)
            e = s - 1
            k = (e * 2**mu / (1 - 400.0**-e)) ** (1 / s)
            stays = set(ranked[: max(int(k), 1)])
        q = exact.softmax(exact.kept(x.tolist(), stays))
        want = exact.invert(q, uniform(12, i))
        assert make.sample(torch.from_numpy(x), [], range(i)).id == want, i
        surprises.append(-math.log2(q[want]))
        mu -= eta * (surprises[-1] - tau)
    assert abs(np.mean(surprises[50:]) - tau) < 0.5


def test_mirostat_copes_with_flat_and_lonely_rows() -> None:
    for version in (1, 2):
        make = sampler(vocab=50, mirostat=version, mirostat_eta=1.0)
        lonely = torch.full((50,), -math.inf)
        lonely[3] = 1.0
        for i in range(20):
            assert 0 <= make.sample(torch.zeros(50), [], range(2 * i)).id < 50
            assert make.sample(lonely, [], range(2 * i + 1)).id == 3


def test_adaptive_p_against_the_definition() -> None:
    rng = np.random.default_rng(9)
    rows = (rng.standard_normal((200, 60)) * 2).astype(np.float32)
    target, decay = 0.3, 0.8
    total, count = target / (1 - decay), 1 / (1 - decay)
    make = sampler(seed=31, vocab=60, min_p=0.02, adaptive_target=target, adaptive_decay=decay)
    drawn = []
    for i, x in enumerate(rows):
        left = exact.kept(x.tolist(), exact.min_p(x.tolist(), 0.02)[0])
        p = exact.softmax(left)
        aim = min(max(2 * target - total / count, 0.0), 1.0)
        d = [abs(v - aim) / 0.3 for v in p]
        bent = [5 - 10 * v * v / (1 + v) if left[t] > GONE else GONE for t, v in enumerate(d)]
        want = exact.invert(exact.softmax(bent), uniform(31, i))
        assert make.sample(torch.from_numpy(x), [], range(i)).id == want, i
        total, count = p[want] + decay * total, 1 + decay * count
        drawn.append(p[want])
    assert abs(np.mean(drawn) - target) < 0.12
