"""What a conversation that outgrows its context should say: the fakes' oracle, and turns of it."""

from collections.abc import Sequence

import torch
from fakes import EOS, LAYERS, FakeSampler, Rig, _from_state, request

from exl_runtime.generation.request import Result

CITIES = ("France", "Spain", "Italy", "Germany", "Japan", "China", "Norway", "Sweden", "Poland", "Egypt")
SIZE = 4


def seen_logits(tokens: Sequence[int], context: int, keep: int) -> torch.Tensor:
    """What the fake says after the last of `tokens`, of which it sees sinks and the latest whole pages."""
    pages = context // SIZE
    sinks = max(1, min(-(-keep // SIZE), pages * 3 // 8))
    last = (len(tokens) - 1) // SIZE
    first = sinks * SIZE + max(0, last - pages + 1) * SIZE
    places = [*range(sinks * SIZE), *range(first, len(tokens))] if last >= pages else range(len(tokens))
    keys = torch.tensor([tokens[place] for place in places], dtype=torch.float32)
    values = torch.tensor([place + 1.0 for place in places])
    return _from_state(torch.stack([keys, values] * LAYERS))


def rolled(prompt: Sequence[int], count: int, *, context: int, keep: int, seed: int = 0) -> tuple[int, ...]:
    sampler, generated = FakeSampler(seed), []
    while len(generated) < count and EOS not in generated:
        logits = seen_logits([*prompt, *generated], context, keep)
        generated.append(sampler.sample(logits, prompt, generated).id)
    return tuple(generated)


def computed(rig: Rig) -> int:
    return sum(sum(new) for new in rig.model.passes)


def turn(rig: Rig, prompt: Sequence[int], count: int, *, speculate: str = "off", **rest: int) -> Result:
    rig.model.passes.clear()
    rest = {"keep": 3, **rest}
    (result,) = rig.generator.run([request(prompt, count, overflow="window", speculate=speculate, **rest)])
    rig.check()
    return result


def question(number: int) -> str:
    """Something the demo knows."""
    return f"What is the capital of {CITIES[(number * number + number // 7) % 10]}?"
