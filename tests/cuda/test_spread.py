"""`load(gpu_split=...)` from the outside: the demo with some layers on an emulated card and the rest on the CPU."""

import pytest
import torch

import exl_runtime as exl
from exl_runtime.cache.types import FP16
from exl_runtime.checkpoint.reader import Checkpoint
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.errors import OutOfMemory, UsageError
from exl_runtime.model.split import Room, measure
from exl_runtime.runtime import spread
from exl_runtime.runtime.draft import DraftNeeds

CPU = torch.device("cpu")
GREEDY = exl.SamplingParams(temperature=0)


@pytest.fixture
def two_rooms(emulated, demo, monkeypatch):
    """A card with room for half of the demo's layers, and the host."""
    seen: list[str] = []
    files = load_config(demo)
    spec = resolve(files.config, files.generation)
    with Checkpoint.open(demo) as checkpoint:
        sizes = measure(checkpoint, spec, cache=FP16, context=256)

    def rooms(split: str) -> list[Room]:
        seen.append(split)
        return [Room(CPU, "cuda", sizes.stage(0, len(spec.layers) // 2)), Room(CPU, "cpu", 8 << 30)]

    monkeypatch.setattr(spread, "available_rooms", rooms)
    return seen


def test_the_demo_answers_from_two_backends_as_from_one(two_rooms) -> None:
    told: list[str] = []
    with exl.load("demo", gpu_split="20,24", cache="fp16", context=256, progress=told.append) as runtime:
        info = runtime.info
        got = runtime.generate([1, 5, 9, 20], max_tokens=4, sampling=GREEDY)
        logits = runtime.logits([1, 5, 9, 20])
    assert two_rooms == ["20,24"] and info.backend == "cuda+cpu" and info.device == "cpu+cpu"
    assert info.context == 256 and info.weight_bytes > 0 and info.cache_bytes > 0
    assert told[0].startswith("layers 0 to ")
    with exl.load("demo", device="cpu", cache="fp16", context=256) as whole:
        wanted = whole.logits([1, 5, 9, 20])
        same = whole.generate([1, 5, 9, 20], max_tokens=4, sampling=GREEDY)
    # Inputs of matrices are halves on the card: 2^-11 each, over a handful of layers.
    assert (logits - wanted).abs().max() <= 0.02 * wanted.abs().max()
    assert got.ids == same.ids
    with pytest.raises(UsageError, match="closed"):
        runtime.logits([1])


@pytest.mark.parametrize(("backend", "context"), [("cuda", 256), ("cpu", "auto")])
def test_a_draft_model_beside_a_model_in_stages(emulated, demo, monkeypatch, backend, context) -> None:
    """On the card where it has room for both, else on the host; the layers that it displaces move on."""
    length = 1024 if context == "auto" else context
    files = load_config(demo)
    spec = resolve(files.config, files.generation)
    with Checkpoint.open(demo) as checkpoint:
        sizes = measure(checkpoint, spec, cache=FP16, context=length)
    half = sizes.stage(0, len(spec.layers) // 2)
    needed = DraftNeeds.of(demo).total_bytes(length, CPU)
    card = half + needed if backend == "cuda" else needed - 1
    monkeypatch.setattr(spread, "available_rooms", lambda _: [Room(CPU, "cuda", card), Room(CPU, "cpu", 8 << 30)])
    told: list[str] = []
    options = {"cache": "fp16", "context": context, "threads": 1}
    with exl.load("demo", gpu_split="20,24", draft="demo", progress=told.append, **options) as runtime:
        assert runtime.info.context == length
        drafter = runtime._engine()._speculator.drafter
        assert drafter.model.backend == backend and drafter.kv.counts == runtime._engine().kv.counts
        got = runtime.generate([1, 5, 9, 20], max_tokens=6, sampling=GREEDY, speculate="draft")
    assert any("of the draft model" in line for line in told)
    assert [line.startswith("layers 0 to 2") for line in told if line.startswith("layers 0")] == [backend == "cuda"]
    assert got.drafted_tokens and got.accepted_tokens
    with exl.load("demo", device="cpu", **options) as whole:
        assert whole.generate([1, 5, 9, 20], max_tokens=6, sampling=GREEDY, speculate="off").ids == got.ids


def test_no_room_for_a_draft_model_is_said_before_anything_loads(emulated, monkeypatch) -> None:
    monkeypatch.setattr(spread, "available_rooms", lambda split: [Room(CPU, "cpu", 8 << 20)])
    told: list[str] = []
    with pytest.raises(OutOfMemory, match="for the draft model demo"):
        exl.load("demo", gpu_split="auto", draft="demo", progress=told.append)
    assert not any("loading" in line for line in told)


def test_no_room_is_said_before_anything_loads(emulated, monkeypatch) -> None:
    monkeypatch.setattr(spread, "available_rooms", lambda split: [Room(CPU, "cpu", 1 << 20)])
    told: list[str] = []
    with pytest.raises(OutOfMemory, match="layers are left for cpu"):
        exl.load("demo", gpu_split="auto", progress=told.append)
    assert not any("loading" in line for line in told)


def test_settings_that_contradict_each_other_are_refused(monkeypatch) -> None:
    for settings, words in (
        ({"device": "cpu"}, "device is 'cpu'"),
        ({"backend": "reference"}, "needs the backend cuda"),
    ):
        with pytest.raises(UsageError, match=words):
            exl.load("demo", gpu_split="auto", **settings)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="needs a GPU, there is none"):
        exl.load("demo", gpu_split="auto")
