"""Tokens drawn inside the native pass: those that are drawn from the logits of the same pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import unavailable
from driving import batch_of, new_cache, open_model
from stepping import in_groups
from tiny import by_name, write

import exl_runtime as exl
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP32
from exl_runtime.model.batch import Plan
from exl_runtime.model.placement import geometry_of
from exl_runtime.model.step import Onward
from exl_runtime.model.transformer import Transformer
from exl_runtime.ops import native, sample

IDS = [(7 * i * i + 3 * i + 11) % 128 + 3 for i in range(40)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("draw")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if why := unavailable("cpu"):
        pytest.skip(why)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_tokens_are_those_of_the_logits(family, root) -> None:
    model = open_model(write(by_name(family), root), "cpu")
    assert model.draws
    plan = Plan.of(batch_of([(IDS[:30], 0, [3]), (IDS[30:33], 0, [5]), (IDS[:1], 0, [4])]))
    logits = model.forward_plan(plan, new_cache(model))
    best = [int(token) for token in logits.argmax(-1)]
    hows = [
        (0.0, 0.0, 0.0, ()) if row % 2 else (1.5, 0.01, (row * 0.37) % 1, sorted({best[row], 5, 9}))
        for row in range(len(best))
    ]
    hows[1] = (0.0, 0.0, 0.0, [best[1]])
    numbers = [number for how in hows for number in how[:3]]
    banned = [number for how in hows for number in (len(how[3]), *how[3])]
    kv = new_cache(model)
    for _ in range(2):  # the second time the pages are known
        drawn = model.draw_plan(plan, kv, numbers, banned)
        assert drawn is not None and drawn[1] != best[1] and drawn[3::2] == best[3::2]
        for row, (temperature, min_p, u, ids) in zip(logits, hows, strict=True):
            if temperature:
                wanted = sample.sample_min_p(row, temperature=temperature, min_p=min_p, u=u, banned=ids)
            else:
                wanted = sample.argmax(row, ids)
            assert drawn.pop(0) == wanted and wanted not in ids


@pytest.mark.parametrize("family", ["gemma3", "qwen2_window", "qwen3_moe"])
def test_passes_ahead_use_the_pages_of_every_group(family, root) -> None:
    """Token by token, with and without passes that run ahead: the same tokens, keys and values."""
    before = native.ops().set_threads(0)
    native.ops().set_threads(1)  # so that a CPU is left for the caller
    model = open_model(write(by_name(family), root), "cpu")
    greedy, onward = [0.0, 0.0, 0.0], Onward([0.0, 0.0, 0.0], [0], ())
    found = []
    try:
        for ahead in (True, False):
            model.runs_ahead = ahead
            kv = KVStorage(geometry_of(model.spec, FP32, 2048), 6, torch.device("cpu"))
            assert len(kv.counts) == (1 if family == "qwen3_moe" else 2)
            count = model.step.program.ahead[0]
            ids, tables = IDS[:30], None
            for _ in range(20):
                past = 0 if tables is None else len(ids) - 1
                batch = in_groups(batch_of([(ids[past:], past, [3])], all_logits=False), kv)
                tables = batch.pages if tables is None else tables
                plan = replace(Plan.of(batch), pages=tables)
                ids = [*ids, *model.draw_plan(plan, kv, greedy, [0], onward)]
            model.halt()
            found.append((ids, [tensor[:, :, :48] for part in kv.parts for tensor in part]))
            assert (model.step.program.ahead[0] - count > 10) == ahead
    finally:
        native.ops().set_threads(before)
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_drawn_is_left_to_others(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    plan, kv = Plan.of(batch_of([(IDS[:4], 0, [0])], all_logits=False)), new_cache(model)
    everything = list(range(model.spec.vocab_size))
    assert model.draw_plan(plan, kv, [0.0, 0.0, 0.0], [len(everything), *everything]) is None
    model.final_norm[3] = torch.nan
    assert model.draw_plan(plan, kv, [0.0, 0.0, 0.0], [0]) is None
    assert not open_model(write(by_name("gemma2"), root), "cpu").draws  # its logits are capped outside


def test_a_draw_that_makes_no_sense_is_refused(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    plan, kv = Plan.of(batch_of([(IDS[:4], 0, [0])], all_logits=False)), new_cache(model)
    for draws, banned, why in (
        ([0.0, 0.0], [0], "3 numbers for each of 1 draws"),
        ([-1.0, 0.0, 0.0], [0], "temperature > 0"),
        ([1.0, 0.0, 1.0], [0], "0 <= u < 1"),
        ([0.0, 0.0, 0.0], [2, 5], "end within those of draw 0"),
        ([0.0, 0.0, 0.0], [2, 5, 5], "must ascend"),
        ([0.0, 0.0, 0.0], [1, model.spec.vocab_size], "must ascend and lie in 0 to"),
    ):
        with pytest.raises(RuntimeError, match=why):
            model.draw_plan(plan, kv, draws, banned)


@pytest.mark.parametrize("speculate", ["off", "ngram"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0, "ignore_eos": True},
        {"temperature": 1.2, "min_p": 0.02, "seed": 5, "banned_tokens": (300, 12)},
        {"temperature": 0.9, "seed": 6, "min_tokens": 20},
        {"temperature": 0, "logprobs": 2},  # needs the logits
    ],
    ids=str,
)
def test_replies_do_not_depend_on_who_draws(sampling, speculate, monkeypatch) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]  # answered within 40 tokens
    prompts = ["Once upon a time", "The little fox and the little fox and the"]
    calls = []
    original = Transformer.draw_plan
    monkeypatch.setattr(Transformer, "draw_plan", lambda *rest: calls.append(1) or original(*rest))

    def replies() -> list[list[int]]:
        with exl.load("demo", context=256, speculate=speculate) as runtime:
            params = exl.SamplingParams(**sampling)
            alone = runtime.generate(question, max_tokens=40, sampling=params)
            return [result.ids for result in (alone, *runtime.generate(prompts, max_tokens=40, sampling=params))]

    ours = replies()
    assert bool(calls) == ("logprobs" not in sampling)
    if sampling["temperature"] == 0:
        assert (len(ours[0]) == 40) == ("ignore_eos" in sampling)
    monkeypatch.setattr(Transformer, "draws", False)
    assert replies() == ours and all(ours)
