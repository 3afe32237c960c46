"""A rolled window of a real Transformer against a float64 model that lists what every token sees, and from where."""

import pytest
import torch
from driving import open_model
from fakes import FakeTokenizer, Recorder
from oracles import assert_as_good_as
from seeing import exact
from tiny import by_name, model_of, write
from torch import Tensor

from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import cache_type
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Request

SIZE, CONTEXT = 16, 64
PAGES, SINKS = CONTEXT // SIZE, 1
PROMPT = [(7 * i * i + 3 * i + 11) % 120 + 5 for i in range(40)]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("rolling")


def generator_of(model, recorder: Recorder, cache: str = "fp32", pages: int = PAGES + 1) -> Generator:
    geometry = CacheGeometry(len(model.spec.layers), model.spec.kv_heads, model.spec.head_dim, cache_type(cache), SIZE)
    kv = KVStorage(geometry, pages, torch.device("cpu"))
    return Generator(model, kv, FakeTokenizer(), context=CONTEXT, make_sampler=lambda request, seed: recorder)


def ask(generator: Generator, prompt: list[int], count: int):
    request = Request(prompt=tuple(prompt), max_tokens=count, overflow="window", keep=3, speculate="off")
    (result,) = generator.run([request])
    return result


def rolled(reference, ids: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits (tokens, vocab), every token seeing sinks and recent pages only."""
    shift = (torch.arange(len(ids)) // SIZE - PAGES + 1).clamp(min=0) * SIZE
    return exact(reference, ids, kept=SINKS * SIZE, shift=shift, dtype=dtype)


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "llama3_rope", "mistral"])
def test_logits_after_rolling_are_those_of_what_is_seen(name, backend, root) -> None:
    recorder = Recorder()
    generator = generator_of(open_model(write(by_name(name), root), backend), recorder)
    result = ask(generator, PROMPT, 140)
    assert result.dropped_tokens == ((len(PROMPT) + 138) // SIZE - PAGES + 1) * SIZE
    ids = [*PROMPT, *result.ids[:-1]]
    ours = torch.stack(recorder.rows)
    naive = rolled(model_of(by_name(name)), ids, torch.float32)[len(PROMPT) - 1 :]
    oracle = rolled(model_of(by_name(name)), ids)[len(PROMPT) - 1 :]
    assert_as_good_as(ours, naive, oracle, factor=6.0, floor=2e-5)


@pytest.mark.parametrize("cache", ["fp16", "q8", "k6v4"])
def test_the_next_turn_continues_the_very_same_state(cache, backend, root) -> None:
    """One reply in one go, and the same in turns that find the pages of the last one: the same logits to the bit."""
    model = open_model(write(by_name("llama"), root), backend)
    whole = Recorder()
    ids = ask(generator_of(model, whole, cache), PROMPT, 160).ids
    turns = Recorder()
    generator, said = generator_of(model, turns, cache, pages=2 * PAGES), list(PROMPT)
    while len(said) < len(PROMPT) + 160:
        result = ask(generator, said, 20)
        known = result.prompt_tokens - result.reused_tokens
        assert known == (len(PROMPT) if said == PROMPT else 1)  # the last token of the turn before
        said += result.ids
    assert said == [*PROMPT, *ids]
    one, other = torch.stack(whole.rows), torch.stack(turns.rows)
    bound = 0.0 if backend == "cpu" else 1e-4 * one.abs().max().item()
    assert (one - other).abs().max().item() <= bound
