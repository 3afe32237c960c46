"""Guesses of a chosen quality for the fake model, and what has to hold of pages after every step."""

import random

from fakes import VOCAB, Rig, expected

from exl_runtime.generation.request import RequestState


def knowing(rig: Rig, right: float, chance: random.Random) -> Rig:
    """Guesses that are the true continuation, each token of it with probability `right`."""

    def found(sequence: object, most: int) -> list[int]:
        asked = sequence.request
        truth = expected(sequence.prompt, len(sequence.generated) + most, asked.sampling.seed, sequence.rope_length)
        guess = truth[len(sequence.generated) :]
        return [token if chance.random() < right else chance.randrange(VOCAB) for token in guess]

    rig.generator._speculator._found = found
    return rig


def check_pages(rig: Rig) -> None:
    """The table's own invariants, and: no sequence holds a page that it would not hold without guesses."""
    rig.table.check()
    for sequence in rig.generator._scheduler.running:
        if sequence.state is RequestState.DECODE:
            assert len(sequence.pages) <= -(-sequence.kv_length // rig.kv.page_size)
            assert sequence.kv_length == len(sequence.tokens) - 1
