"""Turns that leave a real Transformer's conversation, against a float64 model that lists what every token sees."""

from collections.abc import Set
from dataclasses import replace

import pytest
import torch
from driving import open_model
from fakes import FakeTokenizer, Recorder
from oracles import assert_as_good_as
from seeing import exact
from tiny import by_name, model_of, write

from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.pages import Match
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import cache_type
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Left, Request

SIZE, CONTEXT, COUNT = 16, 128, 7
HEAD = [90, 17, 44, 61, 23, 23, 8, 77, 50, 31, 12, 99, 64, 29, 81, 35, 70, 11, 42]  # a page and a little


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("dropping")


def generator_of(model, recorder: Recorder, cache: str = "fp32", pages: int = 2 * CONTEXT // SIZE) -> Generator:
    geometry = CacheGeometry(len(model.spec.layers), model.spec.kv_heads, model.spec.head_dim, cache_type(cache), SIZE)
    kv = KVStorage(geometry, pages, torch.device("cpu"))
    return Generator(model, kv, FakeTokenizer(), context=CONTEXT, make_sampler=lambda request, seed: recorder)


def talk(
    generator: Generator,
    leave: dict[int, int],
    turns: int = 9,
    *,
    head_again: Set[int] = frozenset(),
    again: bool = False,
) -> tuple[list[int], list[int], list[int]]:
    """A conversation from which before turn i leave[i] turns go: all tokens, of each how many had left when it was
    computed, and the places after which something was drawn. head_again: turns that compute the first tokens again;
    again: it was held before, so that some replies cost one token."""
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
        cost = 8 + 1 + (len(HEAD) if number in head_again else 0) if number else len(HEAD) + 8
        assert result.prompt_tokens - result.reused_tokens == cost or again
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
    """However often turns leave, the first tokens are turned once, from what was computed first: even when the copy of
    that has gone, as long as the cache has it."""
    model = open_model(write(by_name("llama"), root), "cpu")
    often, forgetful = Recorder(), Recorder()
    leave = dict.fromkeys(range(3, 9), 1)
    talk(generator_of(model, often, cache), leave)
    generator = generator_of(model, forgetful, cache, pages=64)
    keeper = generator._dropper.sinks
    keeper.find = lambda key: None
    talk(generator, leave)
    assert torch.equal(torch.stack(often.rows), torch.stack(forgetful.rows))


def test_first_tokens_that_are_gone_are_computed_where_they_are_now(root) -> None:
    recorder = Recorder()
    generator = generator_of(open_model(write(by_name("llama"), root), "cpu"), recorder)
    keeper, table, find = generator._dropper.sinks, generator.table, generator.table.match

    def lost(tokens, **options):
        """The plain beginning is not found any more once turns have left."""
        if generator._dropper._states and options["root"] not in roots():
            return Match([], [], None, 0)
        return find(tokens, **options)

    def roots() -> set[bytes]:
        return {root for states in generator._dropper._states.values() for root in states}

    keeper.find, table.match = (lambda key: None), lost
    ids, shift, drawn = talk(generator, LEAVE, head_again={5, 7})
    of = {"kept": len(HEAD), "shift": torch.tensor(shift)}
    naive = exact(model_of(by_name("llama")), ids, dtype=torch.float32, **of)[drawn]
    oracle = exact(model_of(by_name("llama")), ids, **of)[drawn]
    assert_as_good_as(torch.stack(recorder.rows), naive, oracle, factor=6.0, floor=2e-5)


def test_other_turns_that_left_the_same_conversation_are_another_one(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    one, other = Recorder(), Recorder()
    generator = generator_of(model, one, pages=64)
    talk(generator, {4: 1}, turns=5)
    one.rows.clear()
    talk(generator, {4: 2}, turns=5, again=True)
    talk(generator_of(model, other), {4: 2}, turns=5)
    assert torch.equal(torch.stack(one.rows[-COUNT:]), torch.stack(other.rows[-COUNT:]))


def test_what_was_partly_overwritten_is_not_half_used(root) -> None:
    """All of what was moved, or nothing: tokens computed in its place would be others."""
    model = open_model(write(by_name("llama"), root), "cpu")
    ours, plain = Recorder(), Recorder()
    generator = generator_of(model, ours)
    talk(generator, {4: 2}, turns=5)
    ids = talk(generator, {4: 2}, turns=5, again=True)[0]
    (states,) = generator._dropper._states.values()
    (state,) = states.values()
    said = ids[len(HEAD) + 2 * (8 + COUNT) :]
    prompt = (*HEAD, *said, 5, 6, 7)
    match = generator.table.match(prompt, root=state.root)
    last = match.pages[(state.until - 1) // SIZE]
    held = [page for page in (*match.pages, match.source) if page is not None]
    generator.table.release(held)
    taken = []
    while last not in taken:
        taken.append(generator.table.take())
    generator.table.release(taken)
    ours.rows.clear()
    left = Left(past=bytes([2]))
    (result,) = generator.run([Request(prompt=prompt, max_tokens=2, overflow="drop", left=left, speculate="off")])
    fresh = generator_of(model, plain)
    fresh.run([Request(prompt=prompt, max_tokens=2, speculate="off")])
    assert result.prompt_tokens == len(prompt) and torch.equal(torch.stack(ours.rows), torch.stack(plain.rows))


@pytest.mark.parametrize("cache", ["fp32", "q8"])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_layers_with_windows_keep_less_and_lose_nothing(name, cache, backend, root) -> None:
    """Where pages leave that no window sees, what it does see is moved along: `talk` counts what is computed."""
    model = open_model(write(by_name(name), root), backend)
    few, full = Recorder(), Recorder()
    windows = tuple(layer.window for layer in model.spec.layers)
    plain = generator_of(model, full, cache)
    geometry = replace(plain.kv.geometry, windows=windows)
    counts = [2 * geometry.pages_held(group, CONTEXT, 64) for group in geometry.groups]
    kv = KVStorage(geometry, counts, torch.device("cpu"))
    talk(Generator(model, kv, FakeTokenizer(), context=CONTEXT, make_sampler=lambda request, seed: few), LEAVE)
    talk(plain, LEAVE)
    ours, theirs = torch.stack(few.rows), torch.stack(full.rows)
    assert torch.equal(ours, theirs) if backend == "cpu" else torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
