"""Sampling on the device: the tokens of the CPU's `Sampler`, whatever the parameters, batch or order of threads."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.errors import NonFiniteError, UsageError
from exl_runtime.ops import native
from exl_runtime.ops.sample_cuda import advance
from exl_runtime.sampling.device import DeviceSampling, why_not
from exl_runtime.sampling.params import SamplingParams
from exl_runtime.sampling.sampler import Sampler

VOCAB = 2500  # three blocks, the last one short
EOS = {2, 7}


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * scale
    # Ties among the best, and tokens that nothing allows: both are where implementations differ.
    logits[:, 40:44] = logits.max(dim=1, keepdim=True).values - 0.5
    logits[:, 100:120] = -torch.inf
    return logits


def both(card, params: list[SamplingParams], steps: int, *, vocab: int = VOCAB, scale: float = 3.0, capacity=64):
    """Draw `steps` tokens for each of the requests in one batch, on the device and by their Samplers."""
    native.ensure_loaded()
    device = DeviceSampling(slots=len(params), vocab_size=vocab, capacity=capacity, device=card.device)
    prompts = [[5, 9, 9, vocab + 4, 40 + i] for i in range(len(params))]
    samplers = [Sampler(p, vocab_size=vocab, seed=2**63 + 11 * i, eos_ids=EOS) for i, p in enumerate(params)]
    slots = [
        device.admit(p, seed=2**63 + 11 * i, eos_ids=EOS, prompt=prompts[i], generated=[]) for i, p in enumerate(params)
    ]
    on_device, on_host = [[] for _ in params], [[] for _ in params]
    index = torch.tensor(slots, dtype=torch.int32, device=card.device)
    out = torch.empty(len(params), dtype=torch.int64, device=card.device)
    for step in range(steps):
        logits = random_logits(len(params), seed=step, vocab=vocab, scale=scale)
        device.sample(logits.to(card.device), index, out, kind=device.kind(slots))
        for i, sampler in enumerate(samplers):
            on_device[i].append(int(out[i]))
            on_host[i].append(sampler.sample(logits[i], prompts[i], on_host[i]).id)
    return on_device, on_host


SETTINGS = {
    "greedy": SamplingParams(temperature=0),
    "default": SamplingParams(),
    "plain": SamplingParams(temperature=1.3, min_p=0),
    "hot": SamplingParams(temperature=20.0, min_p=0),
    "cold": SamplingParams(temperature=0.002, min_p=0),
    "top_k": SamplingParams(temperature=1.5, min_p=0, top_k=7),
    "top_k_1": SamplingParams(temperature=1.5, top_k=1),
    "top_k_all": SamplingParams(temperature=1.5, min_p=0, top_k=10**6),
    "top_k_tie": SamplingParams(temperature=30.0, min_p=0, top_k=3),
    "top_p": SamplingParams(temperature=1.0, min_p=0, top_p=0.9),
    "top_p_small": SamplingParams(temperature=1.0, min_p=0, top_p=1e-9),
    "top_p_large": SamplingParams(temperature=3.0, min_p=0, top_p=0.99999),
    "all_cuts": SamplingParams(temperature=1.2, top_k=50, top_p=0.95, min_p=0.02),
    "other_order": SamplingParams(temperature=1.2, top_k=50, top_p=0.7, min_p=0.02, order=("min_p", "top_p", "top_k")),
    "last": SamplingParams(temperature=2.0, top_k=40, top_p=0.8, min_p=0.01, temperature_last=True),
    "penalties": SamplingParams(temperature=0.9, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2),
    "penalties_range": SamplingParams(temperature=0, repetition_penalty=3.0, frequency_penalty=1.5, penalty_range=4),
    "bias": SamplingParams(logit_bias={3: 4.0, 40: -2.5, 41: -float("inf"), 2: 3.0}),
    "banned": SamplingParams(banned_tokens=tuple(range(60))),
    "allowed": SamplingParams(temperature=5.0, min_p=0, allowed_tokens=(1, 40, 41, 900, VOCAB - 1)),
    "min_tokens": SamplingParams(temperature=0, min_tokens=5, logit_bias={2: 100.0}),
    "ignore_eos": SamplingParams(temperature=0, ignore_eos=True, logit_bias={2: 100.0, 7: 99.0}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_tokens_are_those_of_the_sampler(card, name) -> None:
    on_device, on_host = both(card, [SETTINGS[name]] * 2, 12)
    assert on_device == on_host


def test_a_batch_of_all_settings_draws_for_each_as_if_it_were_alone(card) -> None:
    on_device, on_host = both(card, [*SETTINGS.values()], 4)
    assert on_device == on_host


def test_the_tokens_do_not_depend_on_the_order_of_threads(card) -> None:
    chosen = [SETTINGS[name] for name in ("greedy", "default", "all_cuts", "penalties", "last")]
    logits = random_logits(len(chosen)).to(card.device)
    index = torch.arange(len(chosen), dtype=torch.int32, device=card.device)

    def run() -> list[torch.Tensor]:
        device = DeviceSampling(slots=8, vocab_size=VOCAB, capacity=16, device=card.device)
        slots = [device.admit(p, seed=9, eos_ids=EOS, prompt=[40, 41], generated=[]) for p in chosen]
        outs = []
        for _ in range(2):  # twice: what a launch leaves behind must serve the next
            out = torch.empty(len(chosen), dtype=torch.int64, device=card.device)
            device.sample(logits, index, out, kind=device.kind(slots))
            outs.append(out)
        return [*outs, device.tensors.wholes, device.tensors.counts]

    card.every_order(run, seeds=2)


@settings(max_examples=25, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 5, 300]),
    top_p=st.sampled_from([1.0, 0.99, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    last=st.booleans(),
    penalty=st.sampled_from([1.0, 1.5, 0.7]),
    reach=st.sampled_from([-1, 0, 1, 6]),
    vocab=st.sampled_from([60, 1024, 1500]),
    scale=st.sampled_from([0.0, 1.0, 12.0]),
)
def test_any_mixture_draws_the_tokens_of_the_sampler(
    emulated, temperature, top_k, top_p, min_p, last, penalty, reach, vocab, scale
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        temperature_last=last,
        repetition_penalty=penalty,
        penalty_range=reach,
    )
    if why_not(params, vocab_size=vocab, capacity=64) is not None:
        return
    on_device, on_host = both(emulated, [params], 5, vocab=vocab, scale=scale)
    assert on_device == on_host


def test_many_equal_logits_are_cut_by_id(card) -> None:
    """More equals than one block can compare at once: the search has to go on by id."""
    params = SamplingParams(temperature=1.0, min_p=0, top_k=1500, top_p=0.5)
    on_device, on_host = both(card, [params] * 2, 6, vocab=4000, scale=0.0)
    assert on_device == on_host
    flat = torch.zeros(1, 4000)
    device = DeviceSampling(slots=1, vocab_size=4000, capacity=8, device=card.device)
    device.admit(params, seed=3, eos_ids=set(), prompt=[], generated=[])
    out = torch.empty(1, dtype=torch.int64, device=card.device)
    index = torch.zeros(1, dtype=torch.int32, device=card.device)
    seen = set()
    for _ in range(40):
        device.sample(flat.to(card.device), index, out, kind=(True, True))
        seen.add(int(out[0]))
    assert max(seen) < 750 and len(seen) > 30


def test_frequencies_are_those_of_the_distribution(card) -> None:
    row, rows, steps = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf, 1.5]), 64, 10
    params = SamplingParams(temperature=1.0, min_p=0.1)
    device = DeviceSampling(slots=rows, vocab_size=6, capacity=4, device=card.device)
    slots = [device.admit(params, seed=i, eos_ids=set(), prompt=[], generated=[]) for i in range(rows)]
    out = torch.empty(rows, dtype=torch.int64, device=card.device)
    index = torch.tensor(slots, dtype=torch.int32, device=card.device)
    counts = np.zeros(6)
    for _ in range(steps):
        device.sample(row.expand(rows, 6).contiguous().to(card.device), index, out, kind=device.kind(slots))
        counts += np.bincount(out.cpu().numpy(), minlength=6)
    exact = torch.softmax(torch.tensor([0.0, 1.0, 2.0, -torch.inf, -torch.inf, 1.5]), 0).numpy()
    draws = rows * steps
    assert counts[3] == counts[4] == 0  # below min_p, and not allowed
    assert np.all(np.abs(counts / draws - exact) < 4 * np.sqrt(exact * (1 - exact) / draws) + 1e-12)


def test_rows_without_a_token_say_so_and_the_sampler_explains(card) -> None:
    device = DeviceSampling(slots=4, vocab_size=VOCAB, capacity=8, device=card.device)
    banned = SamplingParams(banned_tokens=tuple(range(VOCAB - 1)), repetition_penalty=1.1)
    slots = [
        device.admit(p, seed=1, eos_ids=set(), prompt=[], generated=[])
        for p in (SamplingParams(), SamplingParams(temperature=0, repetition_penalty=1.1), banned, SamplingParams())
    ]
    logits = random_logits(4)
    logits[0, 2400], logits[1, 3], logits[2, VOCAB - 1] = torch.nan, torch.inf, -torch.inf
    out = torch.zeros(4, dtype=torch.int64, device=card.device)
    index = torch.tensor(slots, dtype=torch.int32, device=card.device)
    device.sample(logits.to(card.device), index, out, kind=device.kind(slots))
    assert out[:3].tolist() == [-1, -1, -1] and out[3] >= 0
    assert device.tensors.wholes[slots, 1].tolist() == [0, 0, 0, 1]  # nothing was drawn, nothing moves on
    assert device.tensors.counts.sum() == 0
    for row, error in ((0, NonFiniteError), (1, NonFiniteError), (2, UsageError)):
        params = (SamplingParams(), SamplingParams(temperature=0), banned)[row]
        with pytest.raises(error):
            Sampler(params, vocab_size=VOCAB, seed=1).sample(logits[row], [], [])


def test_a_slot_is_put_back_to_an_earlier_token(card) -> None:
    params = SETTINGS["penalties_range"]
    device = DeviceSampling(slots=1, vocab_size=VOCAB, capacity=8, device=card.device)
    slot = device.admit(params, seed=4, eos_ids=EOS, prompt=[1, 2, 3], generated=[])
    index = torch.tensor([slot], dtype=torch.int32, device=card.device)
    out = torch.empty(1, dtype=torch.int64, device=card.device)
    logits = random_logits(1).to(card.device)
    drawn: list[int] = []
    for _ in range(11):  # beyond the ring of 8
        device.sample(logits, index, out, kind=(False, False))
        drawn.append(int(out[0]))
    device.restore(slot, prompt=[1, 2, 3], generated=drawn[:6])
    again = []
    for _ in range(5):
        device.sample(logits, index, out, kind=(False, False))
        again.append(int(out[0]))
    assert again == drawn[6:]
    device.release(slot)
    assert device.room == 1


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (SamplingParams(logprobs=3), "log-probabilities"),
        (SamplingParams(dry_multiplier=0.8), "dry"),
        (SamplingParams(typical_p=0.5), "typical_p"),
        (SamplingParams(mirostat=2), "mirostat"),
        (SamplingParams(min_temp=0.5, max_temp=1.5), "entropy"),
        (SamplingParams(min_keep=3), "min_keep"),
        (SamplingParams(repetition_penalty=1.1, penalty_range=8, penalty_decay=4), "fade"),
        (SamplingParams(repetition_penalty=1.1, penalty_range=64), "remembers 64"),
        (SamplingParams(top_k=5, order=("top_k", "temperature")), "between two cuts"),
        (SamplingParams(logit_bias={1: 1.0}, repetition_penalty=2.0, order=("penalties", "logit_bias")), "order"),
    ],
)
def test_what_the_device_cannot_express_has_a_reason(params, reason) -> None:
    assert reason in (why_not(params, vocab_size=VOCAB, capacity=64) or "")
    assert "vocabulary" in (why_not(SamplingParams(), vocab_size=10**6, capacity=64) or "")


def test_advance_moves_every_row_to_its_next_place(card) -> None:
    pages = torch.tensor([[5, 2, 7], [9, 1, 0]], dtype=torch.int32)
    state = [torch.tensor([11, 12]), torch.tensor([7, 3]), torch.tensor([0, 0])]
    lengths = torch.tensor([8, 4], dtype=torch.int32)  # keys so far: the next token comes behind them
    drawn = torch.tensor([77, -1])
    tokens, positions, slots, lengths, pages, drawn = card.on(*state, lengths, pages, drawn)
    advance(drawn, tokens, positions, slots, lengths, pages, 4)
    assert tokens.tolist() == [77, 12] and positions.tolist() == [8, 4] and lengths.tolist() == [9, 5]
    assert slots.tolist() == [7 * 4 + 0, 1 * 4 + 0]
    advance(drawn, tokens, positions, slots, lengths, pages, 4)
    assert slots.tolist() == [7 * 4 + 1, 1 * 4 + 1]
    for _ in range(3):  # beyond the table: somewhere harmless, in the row's own last page
        advance(drawn, tokens, positions, slots, lengths, pages, 4)
    assert slots.tolist() == [7 * 4 + 0, 0 * 4 + 0]


def test_the_binding_says_what_came_and_what_was_wanted(card) -> None:
    device = DeviceSampling(slots=2, vocab_size=8, capacity=4, device=card.device)
    index = torch.zeros(1, dtype=torch.int32, device=card.device)
    out = torch.zeros(1, dtype=torch.int64, device=card.device)
    with pytest.raises(RuntimeError, match=r"bias must have shape \(\*, 9\)"):
        device.sample(torch.zeros(1, 9, device=card.device), index, out, kind=(False, False))
    with pytest.raises(RuntimeError, match="slots must be a contiguous Int"):
        device.sample(torch.zeros(1, 8, device=card.device), index.long(), out, kind=(False, False))
