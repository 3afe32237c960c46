"""Adapters on the CUDA kernels, emulated: as exact as the model itself, and each row with its own."""

import torch
from adapters import Driven, linears_of, merged, write_adapter
from driving import batch_of, new_cache, open_model
from tiny import by_name, model_of, write

from exl_runtime.cache.types import FP16
from exl_runtime.model.fused import FusedTransformer
from exl_runtime.model.lora import load_adapter, mix_of

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
