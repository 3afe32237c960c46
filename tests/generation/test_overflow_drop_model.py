"""Turns that leave a real Transformer's conversation, against a float64 model that lists what every token sees."""

from dataclasses import dataclass, field

import pytest
import torch
from driving import open_model
from fakes import FakeDraw, FakeTokenizer
from oracles import assert_as_good_as
from seeing import exact
from tiny import by_name, model_of, write
from torch import Tensor

from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import cache_type
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Left, Request

SIZE, CONTEXT, COUNT = 16, 128, 7
HEAD = [90, 17, 44, 61, 23, 23, 8, 77, 50, 31, 12, 99, 64, 29, 81, 35, 70, 11, 42]  # a page and a little


@dataclass
class Recorder:
    """Draws the likeliest token and keeps the logits."""

    rows: list[Tensor] = field(default_factory=list)

    def sample(self, logits: Tensor, prompt: object, generated: object) -> FakeDraw:
        self.rows.append(logits.clone())
        return FakeDraw(int(logits[5:].argmax()) + 5)

    guess = sample


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("dropping")


def generator_of(model, recorder: Recorder, cache: str = "fp32", pages: int = 2 * CONTEXT // SIZE) -> Generator:
    geometry = CacheGeometry(len(model.spec.layers), model.spec.kv_heads, model.spec.head_dim, cache_type(cache), SIZE)
    kv = KVStorage(geometry, pages, torch.device("cpu"))
    return Generator(model, kv, FakeTokenizer(), context=CONTEXT, make_sampler=lambda request, seed: recorder)


def talk(generator: Generator, leave: dict[int, int], turns: int = 9) -> tuple[list[int], list[int], list[int]]:
    """A conversation from which before turn i leave[i] turns go: all tokens, of each how many had left when it was
    computed, and the places after which something was drawn."""
    said: list[list[int]] = []
    ids, shift, drawn = [*HEAD], [0] * len(HEAD), []
    left = 0
    for number in range(turns):
        asked = [(7 * i * i + 3 * i + 11 * number) % 120 + 5 for i in range(8)]
        said.append([*asked])
        before, left = left, left + leave.get(number, 0)
        prompts = [[*HEAD, *(token for turn in said[first:] for token in turn)] for first in (before, left)]
        known = None
        if left:
            whole = tuple(prompts[0]) if left > before else ()
            known = Left(past=bytes([left]), whole=whole, before=bytes([before]) if before else b"")
        prompt = tuple(prompts[1])
        one = Request(prompt=prompt, max_tokens=COUNT, overflow="drop", left=known, speculate="off")
        (result,) = generator.run([one])
        generator.table.check()
        # The last token of the reply before is computed only now.
        assert result.prompt_tokens - result.reused_tokens == (8 + 1 if number else len(HEAD) + 8)
        said[-1] += result.ids
        gone = sum(len(turn) for turn in said[:left])
        ids += [*asked, *result.ids]
        shift += [gone] * (len(ids) - 1 - len(shift))  # the last one waits
        drawn += range(len(ids) - len(result.ids) - 1, len(ids) - 1)
    return ids[:-1], shift, drawn


LEAVE = {4: 2, 5: 1, 7: 2}


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "llama3_rope", "mistral"])
def test_logits_are_those_of_what_is_seen(name, backend, root) -> None:
    recorder = Recorder()
    ids, shift, drawn = talk(generator_of(open_model(write(by_name(name), root), backend), recorder), LEAVE)
    assert shift[-1] == 5 * (8 + COUNT)
    of = {"kept": len(HEAD), "shift": torch.tensor(shift)}
    naive = exact(model_of(by_name(name)), ids, dtype=torch.float32, **of)[drawn]
    oracle = exact(model_of(by_name(name)), ids, **of)[drawn]
    assert_as_good_as(torch.stack(recorder.rows), naive, oracle, factor=6.0, floor=2e-5)


@pytest.mark.parametrize("cache", ["fp32", "fp16", "bf16", "q8", "q4", "k6v4"])
def test_the_same_conversation_gives_the_same_bits(cache, root) -> None:
    """From cold, in a small cache whose pages are overwritten in place, and after others have been there."""
    model = open_model(write(by_name("llama"), root), "cpu")
    recorders = [Recorder(), Recorder(), Recorder()]
    talk(generator_of(model, recorders[0], cache), LEAVE)
    talk(generator_of(model, recorders[1], cache, pages=CONTEXT // SIZE), LEAVE)
    generator = generator_of(model, recorders[2], cache)
    talk(generator, {3: 1}, turns=4)
    recorders[2].rows.clear()
    generator.forget()
    talk(generator, LEAVE)
    first = torch.stack(recorders[0].rows)
    assert all(torch.equal(first, torch.stack(other.rows)) for other in recorders[1:])


@pytest.mark.parametrize("cache", ["fp32", "q4"])
def test_first_tokens_do_not_drift(cache, root) -> None:
    """However often turns leave, the first tokens are turned once, from what was computed first."""
    model = open_model(write(by_name("llama"), root), "cpu")
    often, once = Recorder(), Recorder()
    generator = generator_of(model, often, cache)
    talk(generator, {number: 1 for number in range(3, 12)}, turns=12)
    shift = 9 * (8 + COUNT)
    key = generator._dropper.sinks._kept
    (sinks,) = key.values()
    other = generator_of(model, once, cache)
    other._dropper.sinks.write(sinks, [0, 1], shift=shift, planned=CONTEXT, tokens=len(HEAD))
    state = next(reversed(generator._dropper._states.values()))
    (match,) = [generator.table.match(HEAD[:SIZE], root=root) for root in state]
    for layer in range(len(model.spec.layers)):
        for ours, theirs in zip(generator.kv.layer(layer), other.kv.layer(layer), strict=True):
            assert torch.equal(ours[match.pages[0]], theirs[0])
    generator.table.release(match.pages)
