"""Real Transformers whose window layers keep what they see: to the bit the logits of full pages, and transformers's."""

from dataclasses import replace

import pytest
import torch
from driving import open_model
from fakes import FakeTokenizer, Recorder
from oracles import assert_as_good_as
from tiny import by_name, model_of, write

from exl_runtime.cache.geometry import CacheGeometry, pages_seen
from exl_runtime.cache.pools import capacity
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import cache_type
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Request

SIZE, NEW, CONTEXT = 16, 32, 256
PROMPT = [(7 * i * i + 3 * i + 11) % 120 + 5 for i in range(150)]
NAMES = ["mistral", "phi3", "gemma2", "gemma3", "qwen2_window"]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("windows")


def geometry_of(model, cache: str, *, windowed: bool) -> CacheGeometry:
    spec = model.spec
    plain = CacheGeometry(len(spec.layers), spec.kv_heads, spec.head_dim, cache_type(cache), SIZE)
    return replace(plain, windows=tuple(layer.window for layer in spec.layers)) if windowed else plain


def least(geometry: CacheGeometry) -> list[int]:
    """Pages for one sequence, and one more."""
    return [pages_seen(group.window, NEW, SIZE, CONTEXT // SIZE) + 1 for group in geometry.groups]


def generator_of(model, recorder: Recorder, cache: str = "fp32", *, windowed: bool, times: int = 1) -> Generator:
    geometry = geometry_of(model, cache, windowed=windowed)
    kv = KVStorage(geometry, [times * pages for pages in least(geometry)], torch.device("cpu"))
    return Generator(
        model, kv, FakeTokenizer(), context=CONTEXT, prefill_tokens=NEW, make_sampler=lambda request, seed: recorder
    )


def ask(generator: Generator, prompt: list[int], count: int, **rest: object):
    (result,) = generator.run([Request(prompt=tuple(prompt), max_tokens=count, speculate="off", **rest)])
    generator.pools.check()
    return result


@pytest.mark.parametrize("cache", ["fp32", "q8"])
@pytest.mark.parametrize("name", NAMES)
def test_few_pages_give_the_logits_of_all_pages(name: str, cache: str, backend, root) -> None:
    model = open_model(write(by_name(name), root), backend)
    few, full = Recorder(), Recorder()
    windowed, plain = (
        generator_of(model, few, cache, windowed=True),
        generator_of(model, full, cache, windowed=False),
    )
    assert windowed.kv.nbytes < plain.kv.nbytes
    assert capacity(windowed.kv.geometry, windowed.kv.counts) >= CONTEXT
    said = list(PROMPT)
    for count in (60, 20):  # the second turn finds what is in sight of the first
        first, second = (ask(generator, said, count) for generator in (windowed, plain))
        assert first.ids == second.ids and first.reused_tokens == second.reused_tokens
        said += [*first.ids, 9]
    ours, theirs = torch.stack(few.rows), torch.stack(full.rows)
    assert torch.equal(ours, theirs) if backend == "cpu" else torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    if cache == "fp32":
        ids = torch.tensor([said[: len(PROMPT) + 59]])
        with torch.inference_mode():
            naive = model_of(by_name(name))(ids).logits[0].float()
            oracle = model_of(by_name(name)).double()(ids).logits[0].double()
        assert_as_good_as(ours[:60], naive[len(PROMPT) - 1 :], oracle[len(PROMPT) - 1 :], factor=6.0, floor=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_text_in_few_pages(name: str, backend, root) -> None:
    model = open_model(write(by_name(name), root), backend)
    ours = generator_of(model, Recorder(), windowed=True).logits(PROMPT)
    theirs = generator_of(model, Recorder(), windowed=False).logits(PROMPT)
    assert torch.equal(ours, theirs) if backend == "cpu" else torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_rolled_window_is_the_same_in_few_pages(name: str, backend, root) -> None:
    """Four pages of context, one leaves at a time; the layers' windows see less than what stays."""
    model = open_model(write(by_name(name), root), backend)
    rows = []
    for windowed in (True, False):
        recorder = Recorder()
        geometry = geometry_of(model, "fp32", windowed=windowed)
        kv = KVStorage(geometry, [pages_seen(g.window, NEW, SIZE, 5) + 1 for g in geometry.groups], torch.device("cpu"))
        generator = Generator(
            model, kv, FakeTokenizer(), context=5 * SIZE, prefill_tokens=NEW, make_sampler=lambda *_, r=recorder: r
        )
        said, reused = PROMPT[:40], []
        for count in (120, 30, 30):
            result = ask(generator, said, count, overflow="window", keep=3)
            reused.append(result.prompt_tokens - result.reused_tokens)
            said = [*said, *result.ids, 7]
        assert reused[1:] == [2, 2]
        rows.append(torch.stack(recorder.rows))
    assert torch.equal(*rows) if backend == "cpu" else torch.allclose(*rows, rtol=1e-4, atol=1e-4)
