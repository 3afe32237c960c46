"""Guesses ahead: right, wrong or none, every token is the one that would have been drawn without them."""

import math
import random
from collections import Counter

import pytest
import torch
from fakes import EOS, VOCAB, FakeSpec, FakeTransformer, Rig, expected, logits_of, request, text_of
from guessing import check_pages, knowing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from exl_runtime.errors import UsageError
from exl_runtime.generation import drafting
from exl_runtime.generation.lookup import LEAST, Memory, SuffixIndex
from exl_runtime.generation.pace import MOST, Pace
from exl_runtime.generation.request import Request
from exl_runtime.generation.speculation import BUDGET, Speculator
from exl_runtime.generation.stream import Finished
from exl_runtime.sampling.params import SamplingParams


def drain(rig: Rig) -> dict[str, object]:
    ends = {}
    while rig.generator.busy:
        ends |= {event.request_id: event.result for event in rig.generator.step() if isinstance(event, Finished)}
        check_pages(rig)
    rig.check()
    return ends


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("page_size", [2, 4, 16])
def test_the_same_tokens_whatever_is_guessed(right: float, page_size: int) -> None:
    chance = random.Random(7)
    rig = knowing(Rig(pages=400 // page_size, page_size=page_size, prefill_tokens=24), right, chance)
    wanted = {}
    for k in range(12):
        prompt = [chance.randrange(26) for _ in range(chance.randint(1, 20))]
        name = rig.generator.submit(request(prompt, 20, seed=k, speculate="off" if k % 4 == 3 else "ngram"))
        wanted[name] = tuple(expected(prompt, 20, seed=k))
    ends = drain(rig)
    assert {name: result.ids for name, result in ends.items()} == wanted
    drafted = sum(result.drafted_tokens for result in ends.values())
    accepted = sum(result.accepted_tokens for result in ends.values())
    assert drafted > 20 and accepted <= drafted
    assert accepted == drafted if right == 1 else accepted < 0.9 * drafted
    stats = rig.generator.stats
    assert (stats.drafted_tokens, stats.accepted_tokens) == (drafted, accepted)


def test_right_guesses_save_passes() -> None:
    alone, rig = Rig(context=64), knowing(Rig(context=64), 1.0, random.Random(1))
    for one in (alone, rig):
        one.generator.run([request([1, 2, 3], 30, seed=6)])
    ids = expected([1, 2, 3], 30, seed=6)
    assert len(alone.model.passes) == len(ids)
    assert len(rig.model.passes) < len(ids) / 2


@pytest.mark.parametrize("overflow", ["error", "window"])
def test_at_the_end_of_the_context(overflow: str) -> None:
    results = []
    for right in (0.0, 0.7, None):
        rig = Rig(context=24, pages=8)
        if right is not None:
            knowing(rig, right, random.Random(3))
        results += rig.generator.run([request(range(9), 40, seed=6, overflow=overflow)])
        rig.check()
    assert len({(result.ids, result.stop_reason, result.dropped_tokens) for result in results}) == 1
    assert (results[0].dropped_tokens > 0) == (overflow == "window")


def test_stop_strings_limits_ends_and_logprobs() -> None:
    ids = expected([9, 8], 20, seed=2)
    text = text_of(ids)
    for options in ({"stop": (text[4:6],)}, {"stop_ids": frozenset({ids[3]})}, {"max_tokens": 5}, {"logprobs": 3}):
        plain, guessed = (
            rig.generator.run([request([9, 8], **{"max_tokens": 20, "seed": 2, **options})])[0]
            for rig in (Rig(), knowing(Rig(), 0.8, random.Random(5)))
        )
        assert guessed.drafted_tokens > 0
        for name in ("text", "ids", "stop_reason", "logprobs"):
            assert getattr(plain, name) == getattr(guessed, name), name


def test_short_of_pages_guesses_give_way() -> None:
    chance = random.Random(2)
    rig = knowing(Rig(pages=10, page_size=4, context=40), 0.7, chance)
    wanted = {}
    for k in range(6):
        name = rig.generator.submit(request([k, 1, 2], 28, seed=k))
        wanted[name] = tuple(expected([k, 1, 2], 28, seed=k))
    assert {name: result.ids for name, result in drain(rig).items()} == wanted
    assert rig.generator.stats.preemptions > 0


def test_guesses_of_one_pass_are_bounded() -> None:
    rig = knowing(Rig(pages=400, max_running=50, prefill_tokens=200), 1.0, random.Random(2))
    for k in range(40):
        rig.generator.submit(request([k % 26, k % 5], 6, seed=k))
    drain(rig)
    assert rig.generator.stats.drafted_tokens == 0 or max(map(sum, rig.model.passes)) <= 100 + BUDGET


class Unsure(FakeTransformer):
    """Agrees with the model it drafts for, except after tokens below 6."""

    def forward(self, batch: object, kv: object) -> torch.Tensor:
        logits = super().forward(batch, kv)
        tokens = batch.tokens[batch.logit_rows]
        logits[tokens < 6] = logits[tokens < 6].roll(5, dims=-1)
        return logits


@pytest.mark.parametrize("mode", ["draft", "auto"])
def test_a_draft_model(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "SURE", 0.0)
    rig = Rig(pages=64, prefill_tokens=16, context=64, draft=Unsure(), spec=FakeSpec(rope_switch=40))
    chance, beginning = random.Random(4), list(range(9))
    for _ in range(3):  # later rounds find beginnings in the cache
        wanted = {}
        for k in range(6):
            prompt = [*beginning[: chance.randint(0, 9)], chance.randrange(26), k]
            speculate = "off" if k == 2 else mode
            name = rig.generator.submit(request(prompt, 18, seed=k, speculate=speculate))
            rope = FakeSpec(rope_switch=40).rope_length(len(prompt) + 18)
            wanted[name] = tuple(expected(prompt, 18, seed=k, rope_length=rope))
        ends = drain(rig)
        assert {name: result.ids for name, result in ends.items()} == wanted
    stats = rig.generator.stats
    assert 0.5 * stats.drafted_tokens < stats.accepted_tokens < stats.drafted_tokens


def test_what_the_draft_model_reads_is_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model equal to the model is always right: of its own pages none is ever stale, over cache hits too."""
    monkeypatch.setattr(drafting, "SURE", 0.0)
    rig = Rig(pages=64, context=64, draft=FakeTransformer())
    history = [1, 2, 3, 4, 5, 6]
    for turn in range(5):
        speculate = "off" if turn == 1 else "draft"
        (result,) = rig.generator.run([request(history, 9, seed=turn + 1, speculate=speculate)])
        assert result.ids == tuple(expected(history, 9, seed=turn + 1))
        assert result.accepted_tokens == result.drafted_tokens and (speculate == "off") == (result.drafted_tokens == 0)
        assert turn == 0 or result.reused_tokens > 0
        history += [*(token for token in result.ids if token != EOS), 20 + turn, 7]
    rig.check()


def test_a_draft_model_that_fails_is_done_without() -> None:
    rig = Rig(draft=FakeTransformer())

    def fail(batch: object) -> None:
        raise RuntimeError("draft kernel")

    rig.draft.before = fail
    (result,) = rig.generator.run([request([1, 2, 3], 12, speculate="draft")])
    assert result.ids == tuple(expected([1, 2, 3], 12)) and result.drafted_tokens == 0
    rig.check()


def test_a_draft_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="no draft model"):
        Rig().generator.submit(request([1], speculate="draft"))
    with pytest.raises(UsageError, match="auto, ngram, draft, off"):
        request([1], speculate="much")


def test_the_distribution_is_the_models() -> None:
    """Over many seeds, the token after a right guess has the model's probabilities: chi-square, 31 degrees."""
    prompt, counts, total = [3, 1], Counter(), 0
    first = int(logits_of(prompt).argmax())
    rig = Rig(pages=64, max_running=64)
    rig.generator._intake._make_sampler = rig.generator._intake._default_sampler
    guess = int(logits_of([*prompt, first]).argmax())
    # The first token is fixed by a bias, the second is guessed as the likeliest, the third as something.
    rig.generator._speculator._found = lambda sequence, most: [guess, 5][:most]
    for seed in range(1500):
        sampling = SamplingParams(temperature=1.0, min_p=0.0, seed=seed, logit_bias={first: 0.0})
        asked = request([*prompt, first], 4, speculate="ngram")
        ids = rig.generator.run([type(asked)(prompt=asked.prompt, max_tokens=3, sampling=sampling)])[0].ids
        if len(ids) > 1:
            counts[ids[0], ids[1]] += 1
            total += ids[0] == guess
    after = torch.softmax(logits_of([*prompt, first, guess]).double(), dim=-1)
    observed = torch.tensor([counts[guess, token] for token in range(VOCAB)], dtype=torch.float64)
    assert total > 150
    chi = float(((observed - total * after) ** 2 / (total * after)).sum())
    assert chi < 70, chi  # 70 is passed by chance once in 20 000


def test_the_distribution_is_the_models_with_a_draft_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens, drawn at temperature 1 behind the guesses of another model: chi-square against exact probabilities.

    Pairs expected less than 5 times share one cell, as the test wants.
    """
    monkeypatch.setattr(drafting, "SURE", 0.0)
    rig, prompt, seeds = Rig(pages=64, max_running=64, draft=Unsure()), [3, 1], 1500
    rig.generator._intake._make_sampler = rig.generator._intake._default_sampler
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for start in range(0, seeds, 50):
        asked = [
            Request(
                prompt=tuple(prompt),
                max_tokens=3,
                speculate="draft",
                sampling=SamplingParams(temperature=1.0, min_p=0.0, seed=seed),
            )
            for seed in range(start, start + 50)
        ]
        for result in rig.generator.run(asked):
            counts[result.ids[:2]] += 1
            drafted, accepted = drafted + result.drafted_tokens, accepted + result.accepted_tokens
    first = torch.softmax(logits_of(prompt).double(), dim=-1)
    wanted: dict[tuple[int, ...], float] = {(EOS,): float(first[EOS])}
    for token in range(VOCAB):
        after = torch.softmax(logits_of([*prompt, token]).double(), dim=-1)
        if token != EOS:
            wanted |= {(token, second): float(first[token] * after[second]) for second in range(VOCAB)}
    assert set(counts) <= set(wanted) and abs(sum(wanted.values()) - 1) < 1e-9
    cells = [(counts[pair], seeds * share) for pair, share in wanted.items() if seeds * share >= 5]
    seen, due = map(sum, zip(*cells, strict=True))
    cells.append((seeds - seen, seeds - due))
    chi = sum((observed - mean) ** 2 / mean for observed, mean in cells)
    degrees = len(cells) - 1
    assert degrees > 10
    assert chi < degrees + 4 * (2 * degrees) ** 0.5, (chi, degrees)  # mean and deviation of chi-square
    assert 0.2 * drafted < accepted < 0.95 * drafted


class Machine(RuleBasedStateMachine):
    """Requests come and go in any order, with guesses of any quality."""

    @initialize(seed=st.integers(0, 999), page_size=st.sampled_from([2, 3, 4]), right=st.sampled_from([0.3, 0.9]))
    def start(self, seed: int, page_size: int, right: float) -> None:
        self.rig = knowing(Rig(pages=14, page_size=page_size, context=24, draft=Unsure()), right, random.Random(seed))
        self.wanted: dict[str, tuple[int, ...]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        count=st.integers(1, 12),
        seed=st.integers(0, 3),
        mode=st.sampled_from(["auto", "ngram", "draft", "off"]),
    )
    def submit(self, prompt: list[int], count: int, seed: int, mode: str) -> None:
        name = self.rig.generator.submit(request(prompt, count, seed=seed, speculate=mode))
        self.wanted[name] = tuple(expected(prompt, count, seed=seed))

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            for event in self.rig.generator.step():
                if isinstance(event, Finished):
                    wanted = self.wanted.pop(event.request_id)
                    cut = event.result.stop_reason == "cancelled"
                    assert event.result.ids == (wanted[: len(event.result.ids)] if cut else wanted)
            check_pages(self.rig)

    @rule(which=st.integers(0, 20))
    def cancel(self, which: int) -> None:
        if self.wanted:
            self.rig.generator.cancel(list(self.wanted)[which % len(self.wanted)])

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            while self.rig.generator.busy:
                self.step(1)
            self.rig.check()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def test_the_longest_and_latest_match_speaks() -> None:
    index = SuffixIndex([1, 2, 3, 4, 9, 2, 3, 4, 5, 0, 2, 3, 4])
    assert index.find(index.tokens, 3) == ([5, 0, 2], 3)
    index.extend([7, 1, 2, 3, 4])
    assert index.find(index.tokens, 2) == ([9, 2], 4)
    assert index.find([8, 8, 8], 2) == ([], 0)
    assert index.find([1], 2) == ([], 0)
    loop = SuffixIndex([5, 6, 7] * 4)
    assert loop.find(loop.tokens, 7) == ([5, 6, 7, 5, 6, 7, 5], 9)


def test_an_index_grown_piece_by_piece_is_the_same() -> None:
    chance = random.Random(3)
    tokens = [chance.randrange(3) for _ in range(200)]
    grown = SuffixIndex()
    for at, token in enumerate(tokens):
        grown.extend([token])
        guess, agreement = grown.find(tokens[: at + 1], 4)
        assert (guess, agreement) == SuffixIndex(tokens[: at + 1]).find(tokens[: at + 1], 4)
        if agreement:
            assert agreement >= LEAST
            places = [
                e for e in range(LEAST, at + 1) if tokens[e - agreement : e] == tokens[at + 1 - agreement : at + 1]
            ]
            assert any(tokens[e : at + 1][: len(guess)] == guess[: at + 1 - e] for e in places)


def test_memory_of_old_replies_forgets_and_keeps_texts_apart() -> None:
    memory = Memory(capacity=20)
    memory.add([1, 2, 3, 4, 5])
    assert memory.find([9, 1, 2, 3], 8) == ([4, 5], 3)
    for k in range(6):
        memory.add([10 + k] * 4)
    assert memory.find([1, 2, 3], 2) == ([], 0)
    assert len(memory._index.tokens) <= 20


def test_pace() -> None:
    pace = Pace()
    for _ in range(10):
        pace.learn(pace.allow(), pace.allow())
    assert pace.allow() == MOST
    for _ in range(8):
        pace.learn(4, 0)
        if pace.pause:
            break
    assert pace.pause == 4 and [pace.allow() for _ in range(5)] == [0, 0, 0, 0, 2]
    assert math.isclose(pace.share, 0.5)


def test_a_text_told_before_is_guessed() -> None:
    rig = Rig(pages=64, context=200)
    (first,) = rig.generator.run([request([1, 2, 3], 60, seed=6)])
    assert len(first.ids) > 15
    rig.generator.forget()
    (again,) = rig.generator.run([request([1, 2, 3], 60, seed=6)])
    assert again.ids == first.ids and again.accepted_tokens > len(first.ids) / 2
    other = Rig(pages=64, context=200)
    other.generator.remember(first.ids)
    assert other.generator.run([request([1, 2, 3], 60, seed=6)])[0].accepted_tokens == again.accepted_tokens
    assert isinstance(other.generator._speculator, Speculator)
