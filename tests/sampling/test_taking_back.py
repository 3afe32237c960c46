"""Samplers that keep state: guesses leave none behind, and draws can be taken back."""

import pytest
import torch

from exl_runtime.sampling.params import SamplingParams
from exl_runtime.sampling.sampler import Sampler

VOCAB = 50
CHAINS = [{"mirostat": 1}, {"mirostat": 2}, {"adaptive_target": 0.4}, {"mirostat": 2, "dry_multiplier": 0.8}, {}]


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


def draws(sampler: Sampler, logits: torch.Tensor, start: list[int]) -> list[int]:
    ids = list(start)
    for row in logits:
        ids.append(sampler.sample(row, [1, 2], ids).id)
    return ids[len(start) :]


@pytest.mark.parametrize("chain", CHAINS)
def test_guesses_change_nothing(chain: dict[str, float]) -> None:
    logits, other = rows(30), rows(60)[30:]
    plain, guessing = (Sampler(SamplingParams(**chain), vocab_size=VOCAB, seed=5) for _ in range(2))
    wanted = draws(plain, logits, [])
    ids: list[int] = []
    for row, wrong in zip(logits, other, strict=True):
        assert guessing.guess(row, [1, 2], ids) == guessing.guess(row, [1, 2], ids)
        guessing.guess(wrong, [1, 2], [*ids, 4])
        ids.append(guessing.sample(row, [1, 2], ids).id)
    assert ids == wanted


@pytest.mark.parametrize("chain", CHAINS)
def test_draws_taken_back_are_forgotten(chain: dict[str, float]) -> None:
    logits, other = rows(30), rows(60)[30:]
    sampler = Sampler(SamplingParams(**chain), vocab_size=VOCAB, seed=5)
    first = draws(sampler, logits[:10], [])
    state = sampler.state()
    wanted = draws(sampler, logits[10:], first)
    after = sampler.state()
    sampler.restore(state)
    wrong = draws(sampler, other[10:], first)
    assert wrong != wanted
    sampler.restore(state)
    assert draws(sampler, logits[10:], first) == wanted
    assert bool(state) == any(name in chain for name in ("mirostat", "adaptive_target"))
    assert not state or str(state) != str(after)


def test_judging_a_token() -> None:
    row = rows(1)[0]
    sampler = Sampler(SamplingParams(temperature=0, logprobs=2), vocab_size=VOCAB, seed=1)
    assert sampler.judge(sampler.sample(row, [], []).id, row) == sampler.sample(row, [], [])
    assert Sampler(SamplingParams(), vocab_size=VOCAB, seed=1).judge(3, row).logprob is None
