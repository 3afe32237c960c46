"""Adapters on the CUDA kernels, emulated: as exact as the model itself, and each row with its own."""

from pathlib import Path

import pytest
import torch
from adapter_cases import CASES, Made, changed, made
from adapters import Driven, linears_of, merged, write_adapter
from driving import batch_of, new_cache, open_model
from tiny import by_name, model_of, write

from exl_runtime.cache.types import FP16
from exl_runtime.checkpoint.reader import Checkpoint
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.model.adapter_loading import load_adapter
from exl_runtime.model.fused import FusedTransformer
from exl_runtime.model.lora import mix_of
from exl_runtime.model.placement import geometry_of
from exl_runtime.model.split import Stage
from exl_runtime.model.split_model import SplitCache, SplitTransformer, load_split

IDS = [(7 * i * i + 3 * i + 11) % 128 + 3 for i in range(30)]


def exact(reference, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([ids]), use_cache=False).logits[0]


def test_an_adapter_equals_merged_weights(emulated, tmp_path) -> None:
    model = open_model(write(by_name("llama"), tmp_path), "cuda", torch.float16)
    assert isinstance(model, FusedTransformer)
    reference = model_of(by_name("llama"))
    path = write_adapter(tmp_path / "adapter", linears_of(reference, ("q_proj", "v_proj", "up_proj", "down_proj")))
    mix = mix_of([(load_adapter(path, model), 1.0)])
    plain = exact(reference.double(), IDS)
    oracle = exact(merged(reference, [(path, 1.0)]), IDS)
    batch = batch_of([(IDS, 0, [2]), (IDS, 0, [0])])
    found = Driven(model, mixes=(mix, ())).forward(batch, new_cache(model, type=FP16))
    own = model.forward(batch, new_cache(model, type=FP16))[: len(IDS)]
    bound = 4 * (own - plain).abs().max()
    assert bound < 0.1 * (oracle - plain).abs().max()
    assert (found[: len(IDS)] - oracle).abs().max() <= bound
    assert (found[len(IDS) :] - plain).abs().max() <= bound


def open_split(folder: Path, cut: int) -> SplitTransformer:
    """The first layers on the emulated card, the others on the CPU."""
    files = load_config(folder)
    spec = resolve(files.config, files.generation)
    cpu = torch.device("cpu")
    stages = (Stage(cpu, "cuda", 0, cut, 0), Stage(cpu, "cpu", cut, len(spec.layers), 0))
    with Checkpoint.open(folder) as checkpoint:
        return load_split(checkpoint, spec, stages)


def cache_of(model: SplitTransformer) -> SplitCache:
    return SplitCache(geometry_of(model.spec, FP16), 6, [part.stage for part in model.parts])


KINDS = (
    "dora",
    "dora of an embedding",
    "all biases",
    "whole modules",
    "an embedding and the head",
    "single tokens of a tied head",
    "stacked experts and routers",
)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_equals_changed_parameters(name, emulated, tmp_path) -> None:
    family = by_name(CASES[name][0])
    model = open_model(write(family, tmp_path), "cuda", torch.float16)
    check_kind(name, model, lambda: new_cache(model, type=FP16), tmp_path)


@pytest.mark.parametrize("name", ["dora", "an embedding and the head", "stacked experts and routers"])
def test_adapters_of_a_model_on_two_devices(name, emulated, tmp_path) -> None:
    model = open_split(write(by_name(CASES[name][0]), tmp_path), 2)
    check_kind(name, model, lambda: cache_of(model), tmp_path)


def check_kind(name, model, cache, folder) -> None:
    """Half precision rounds the adapted model as much as the plain one."""
    family = by_name(CASES[name][0])
    case = steady_case(name, family)
    mix = mix_of([(load_adapter(case.write(folder / "adapter"), model), 1.0)])
    plain, oracle = exact(model_of(family).double(), IDS), exact(changed(model_of(family), [(case, 1.0)]), IDS)
    batch = batch_of([(IDS, 0, [2]), (IDS, 0, [0])])
    found = Driven(model, mixes=(mix, ())).forward(batch, cache())
    bound = 4 * (model.forward(batch, cache())[: len(IDS)] - plain).abs().max()
    assert bound < 0.1 * (oracle - plain).abs().max()
    assert (found[: len(IDS)] - oracle).abs().max() <= bound
    assert (found[len(IDS) :] - plain).abs().max() <= bound


def steady_case(name: str, family) -> Made:
    """The case with the first seed for which no token has two experts so alike that half precision may choose the
    other: router logits of about 1 have errors of a few 2^-11 there."""
    for seed in range(5, 50):
        case = made(name, model_of(family), seed)
        reference = changed(model_of(family), [(case, 1.0)])
        chosen = getattr(reference.config, "num_experts_per_tok", None)
        if chosen is None:
            return case
        with torch.inference_mode():
            routers = reference(torch.tensor([IDS]), use_cache=False, output_router_logits=True).router_logits
        best = torch.stack([logits.topk(chosen + 1).values for logits in routers])
        if float((best[..., chosen - 1] - best[..., chosen]).min()) > 2**-6:
            return case
    raise AssertionError("no seed without near ties")
