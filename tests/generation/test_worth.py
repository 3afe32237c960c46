"""A draft model that costs more than it saves pauses, one that pays stays, and the text is the same either way."""

import logging

import pytest
from fakes import FakeTransformer, Rig, expected, request

from exl_runtime.generation import drafting
from exl_runtime.generation.worth import AGAIN, PAUSES, PLAIN, TRIAL, Worth

PROMPT = [(7 * i * i + 3 * i) % 25 for i in range(9)]


def drive(worth: Worth, steps: int, *, guessed: float, plain: float, count: int = 1) -> list[bool]:
    """Tokens per second with and without; which steps guessed."""
    taken = []
    for _ in range(steps):
        allowed = worth.allows(count)
        worth.observe(count, guessed=allowed, tokens=10, seconds=10 / (guessed if allowed else plain))
        taken.append(allowed)
    return taken


def test_what_is_slower_pauses_longer_and_longer() -> None:
    taken = drive(Worth(), 2000, guessed=50, plain=100)
    trial = [True] * TRIAL + [False] * PLAIN
    assert taken[: len(trial)] == trial
    begins = [i for i in range(1, len(taken)) if taken[i] and not taken[i - 1]]
    gaps = [b - a - TRIAL - PLAIN for a, b in zip([0, *begins], begins, strict=False)]
    assert gaps[:3] == [PAUSES[0], 2 * PAUSES[0], 4 * PAUSES[0]]


def test_what_is_faster_goes_on_and_is_looked_at_again() -> None:
    taken = drive(Worth(), 2 * AGAIN, guessed=130, plain=100)
    assert taken.count(False) == 2 * PLAIN and taken[TRIAL : TRIAL + PLAIN] == [False] * PLAIN
    worth = Worth()
    drive(worth, 100, guessed=130, plain=100)
    assert drive(worth, 4 * AGAIN, guessed=20, plain=100).count(True) < 2 * AGAIN, "it became slow later"


def test_numbers_of_replies_are_told_apart_and_noise_is_borne() -> None:
    worth = Worth()
    drive(worth, 100, guessed=50, plain=100, count=1)
    assert not worth.allows(1) and worth.allows(8)
    assert drive(Worth(), 500, guessed=98.5, plain=100).count(False) == PLAIN


@pytest.mark.parametrize(("cost", "pauses"), [(1.0, True), (0.001, False)])
def test_a_slow_draft_model_is_paused_and_changes_no_token(cost, pauses, caplog, monkeypatch) -> None:
    """The fake draft model is always right. Both models take time by the rig's clock."""
    monkeypatch.setattr(drafting, "SURE", 0.0)
    rig = Rig(pages=400, draft=FakeTransformer())

    def takes(seconds: float):
        def wait(batch: object) -> None:
            rig.clock.now += seconds

        return wait

    rig.model.before, rig.draft.before = takes(0.1), takes(cost)
    with caplog.at_level(logging.WARNING):
        (result,) = rig.generator.run([request(PROMPT, 900, seed=4, id="a", stop_ids=frozenset())])
    assert list(result.ids) == expected(PROMPT, 900, seed=4)
    assert len(result.ids) > 300, "long enough to say something"
    assert ("slows replies down" in caplog.text) == pauses
    unguessed = rig.model.passes.count([1])
    assert (unguessed > PAUSES[0]) == pauses and (unguessed < 2 * PLAIN) != pauses
    rig.check()
