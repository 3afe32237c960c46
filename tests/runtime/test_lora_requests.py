"""Adapters by request: names and weights, batches, the prefix cache, switching and freeing."""

import gc
import threading
import weakref
from pathlib import Path

import pytest
from adapters import shapes_of, write_adapter

import exl_runtime as exl
from exl_runtime.model.adapted import Adapted

PROMPT = "Once upon a time there was a little fox who lived in the north with a hen, a dog and an old map. " * 3
GREEDY = exl.SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def rt():
    with exl.load("demo", context=600, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def folders(rt, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    shapes = shapes_of(rt._engine().model)
    return [write_adapter(root / name, shapes, seed=seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture
def loaded(rt, folders):
    names = [rt.load_lora(folder) for folder in folders]
    yield names
    rt.set_lora(None)
    for info in rt.loras:
        rt.unload_lora(info.name)


def told(rt, lora=None, prompt=PROMPT, **options) -> exl.Result:
    return rt.generate(prompt, max_tokens=10, sampling=GREEDY, lora=lora, **options)


def test_each_request_has_its_own_adapters(rt, loaded) -> None:
    assert loaded == ["one", "two"]
    plain = told(rt, {})
    found = [told(rt, lora).ids for lora in ("one", "two", {"one": 0.5}, {"one": 1, "two": 1}, ["one", "two"])]
    assert len({plain.ids, *found}) == 5 and found[3] == found[4]
    assert told(rt, {"one": 0.0}).ids == plain.ids
    assert told(rt, {"two": 1, "one": 1}).ids == found[3]


def test_a_mixed_batch_equals_single_requests(rt, loaded) -> None:
    mixes = ({}, {"one": 1.0}, {"two": 0.8}, {"one": 0.5, "two": 0.5})
    alone = [told(rt, mix).ids for mix in mixes]
    rt._engine().forget()
    found: dict[int, tuple[int, ...]] = {}
    threads = [
        threading.Thread(target=lambda i=i, mix=mix: found.update({i: told(rt, mix).ids}))
        for i, mix in enumerate(mixes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(mixes))] == alone


def test_keys_and_values_are_shared_within_one_mix_only(rt, loaded) -> None:
    rt._engine().forget()
    cold = {}
    for lora in ("one", "two", None):
        first = told(rt, lora)
        assert first.reused_tokens == 0, lora
        cold[lora] = first.ids
    for lora in ("one", "two", None):
        again = told(rt, lora)
        assert again.reused_tokens == again.prompt_tokens - 1 and again.ids == cold[lora]
    rt.unload_lora("one")
    rt.load_lora(next(Path(info.path).parent for info in rt.loras) / "one", "other name")
    assert told(rt, "other name").reused_tokens > 0, "the same files give the same keys and values"


def test_the_default_mix_and_switching(rt, loaded) -> None:
    plain, one = told(rt).ids, told(rt, "one").ids
    rt.set_lora({"one": 1.0})
    assert told(rt).ids == one and told(rt, {}).ids == plain
    assert [(info.name, info.weight) for info in rt.loras] == [("one", 1.0), ("two", 0.0)]
    assert rt.loras[0].rank == 5 and rt.loras[0].nbytes > 10_000
    rt.set_lora(None)
    assert told(rt).ids == plain
    ids = rt.tokenizer.encode("Once upon a time")
    assert (rt.logits(ids, lora="one") - rt.logits(ids)).abs().max() > 0.1


def test_passes_without_an_adapter_are_the_models_own(rt, loaded, monkeypatch) -> None:
    told(rt, "one", prompt="a")
    monkeypatch.setattr(Adapted, "forward_plan", lambda *_: pytest.fail("an adapted pass"))
    told(rt, {}, prompt="a")


def test_guesses_and_guidance_run_under_the_same_adapters(rt, loaded) -> None:
    copying = "one two three four five six seven eight. " * 4
    plain, guessed = (told(rt, "one", prompt=copying, speculate=mode) for mode in ("off", "ngram"))
    assert plain.ids == guessed.ids
    prompt, against = (rt.tokenizer.encode(text, add_bos=None) for text in (PROMPT, "Once upon a day"))
    reply = told(rt, "one", negative_prompt=against, guidance=1.5).ids
    for count, token in enumerate(reply):
        logits = [rt.logits([*ids, *reply[:count]], lora="one")[-1] for ids in (prompt, against)]
        towards, away = (row.log_softmax(-1) for row in logits)
        assert int((away + 1.5 * (towards - away)).argmax()) == token
    samples = rt.generate(PROMPT, n=3, max_tokens=5, lora="two", sampling=exl.SamplingParams(seed=3))
    assert [s.reused_tokens > 0 for s in samples[1:]] == [True, True]


def test_unloading_frees_the_memory_once_nobody_uses_it(rt, folders) -> None:
    rt.load_lora(folders[0], "gone")
    adapter = weakref.ref(rt._loras.mix("gone")[0][0])
    stream = rt.stream(PROMPT, max_tokens=5, sampling=GREEDY, lora="gone")
    next(stream)
    rt.unload_lora("gone")
    ids = [event.result.ids for event in stream if isinstance(event, exl.Finished)]
    assert len(ids[0]) == 5, "a request that runs with it ends with it"
    del stream
    gc.collect()
    assert adapter() is None
    with pytest.raises(exl.errors.UsageError, match="no adapter 'gone'"):
        told(rt, "gone")


def test_mistakes_are_named(rt, folders, loaded) -> None:
    for lora, says in ((["three"], "loaded: one, two"), ({"one": float("nan")}, "weight"), ({"one": "1"}, "weight")):
        with pytest.raises(exl.errors.UsageError, match=says):
            told(rt, lora)
    with pytest.raises(exl.errors.UsageError, match="already"):
        rt.load_lora(folders[0])
    with pytest.raises(exl.errors.UsageError, match="no adapter"):
        rt.unload_lora("three")
