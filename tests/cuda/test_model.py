"""Whole tiny models on the CUDA kernels, emulated: against float32, and any way to cut a sequence against the whole."""

import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from driving import batch_of, new_cache, open_model, run
from oracles import assert_as_good_as, same_bits
from quantize import quantize_folder
from tiny import by_name, write

from exl_runtime.cache.types import FP16
from exl_runtime.errors import NonFiniteError
from exl_runtime.model import fused
from exl_runtime.model.fused import FusedTransformer
from exl_runtime.model.split_model import free_devices
from exl_runtime.model.transformer import Transformer
from exl_runtime.ops import activation, cuda_small
from exl_runtime.ops.attention import cuda as attention
from exl_runtime.ops.linear import packed_cuda
from exl_runtime.ops.linear.gptq_cuda import GptqCuda
from exl_runtime.ops.linear.reference import Reference

IDS = [(7 * i * i + 3 * i + 11) % 128 + 3 for i in range(40)]
JOINED = "gptq-in-order"  # gate and up take their inputs in one order, so that they share a launch
DENSE = ["llama_bias", "qwen3", "gemma2", "phi3", "mixtral"]  # biases and a tied head, head norms, post norms, experts


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@cache
def folder_of(root: Path, name: str, kind: str) -> Path:
    source = write(by_name(name), root)
    if kind != "dense":
        target = root / f"{name}-{kind}"
        options = {"bits": 4, "group_size": 32, "act_order": kind == "gptq", "symmetric": False, "version": 1}
        quantize_folder(source, target, kind.split("-")[0], **({} if kind == "exl2" else options))
        return target
    return source


@cache
def models(root: Path, name: str, kind: str) -> tuple[Transformer, Transformer, Transformer]:
    """On the CUDA kernels in half precision; by plain torch in half precision; by plain torch in float32."""
    folder = folder_of(root, name, kind)
    half = torch.float16
    return open_model(folder, "cuda", half), open_model(folder, "reference", half), open_model(folder, "reference")


def exact(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Float32 from end to end: 2^13 times finer than what is judged here."""
    return run(model, ids, []).double()


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "dense") for name in DENSE), ("llama", "exl2"), ("gemma2", "exl2"), ("llama", "gptq"), ("llama", JOINED)],
)
def test_logits_are_as_good_as_torch_in_half_precision(emulated, root, name, kind) -> None:
    ours, naive, wide = models(root, name, kind)
    assert type(ours) is FusedTransformer and type(naive) is Transformer
    assert_as_good_as(run(ours, IDS, []), run(naive, IDS, []), exact(wide, IDS), factor=3.0)


@pytest.mark.parametrize(("name", "kind"), [("llama", "exl2"), ("qwen2_window", "exl2")])
def test_single_tokens_and_batches_give_the_same_bits(emulated, root, name, kind) -> None:
    model = models(root, name, kind)[0]
    kv = new_cache(model, type=FP16)
    ids, other = IDS[:20], IDS[9:15]
    model.forward(batch_of([(ids, 0, [3])]), kv)
    model.forward(batch_of([(other, 0, [1])]), kv)
    alone = [
        model.forward(batch_of([([7], 20, [3])]), kv),
        model.forward(batch_of([([9], 6, [1])]), kv),
    ]
    together = model.forward(batch_of([([7], 20, [3]), ([9], 6, [1])]), kv)
    assert same_bits(together, torch.cat(alone))
    guessed = model.forward(batch_of([([7, 11, 12], 20, [3])]), kv)
    assert same_bits(guessed[:1], alone[0])


@pytest.mark.parametrize("joined", [True, False])
def test_products_beyond_half_precision_survive(emulated, root, monkeypatch, joined) -> None:
    """Activations of models made for bfloat16 outgrow float16 between the activation and the last matrix."""
    ours, _, wide = models(root, "llama", JOINED)
    seen: list[float] = []
    plain, in_one = cuda_small.gated, fused.gated_together

    def louder(y):
        # The same power of two in both models: exact, so that nothing but the range is tested.
        y = y * 2.0**14
        seen.append(float(y.abs().max()))
        return y

    def loud(gate, up, name, **more):
        return louder(plain(gate, up, name, **more))

    def loud_in_one(*args, **more):
        return louder(in_one(*args, **more)) if joined else None

    def loud_reference(gate, up, name):
        return activation.gated(gate, up, name) * 2.0**14

    monkeypatch.setattr(cuda_small, "gated", loud)
    monkeypatch.setattr(fused, "gated_together", loud_in_one)
    for block in wide.blocks:
        monkeypatch.setattr(block.mlp, "_gated", loud_reference)
    ids = IDS[:12]
    got, oracle = run(ours, ids, []), exact(wide, ids)
    assert max(seen) > 65504 and len(seen) == len(ours.blocks)
    assert (got.double() - oracle).abs().max() <= 0.01 * oracle.abs().max()


def test_a_step_gates_in_one_launch(emulated, root, monkeypatch) -> None:
    """Of quantized models; more rows and dense matrices take more."""
    calls: list[int] = []
    plain = cuda_small.gated
    monkeypatch.setattr(cuda_small, "gated", lambda gate, *rest, **more: calls.append(1) or plain(gate, *rest, **more))
    joined = models(root, "llama", JOINED)[0]
    limit = packed_cuda.MOST_ROWS
    ids = [IDS[i % len(IDS)] for i in range(limit + 1)]
    run(joined, ids[:limit], [])
    assert not calls
    run(joined, ids, [])
    assert len(calls) == len(joined.blocks)
    run(models(root, "qwen3", "dense")[0], IDS[:3], [])
    assert len(calls) > len(joined.blocks)


def test_a_matrix_that_no_kernel_takes_runs_in_plain_torch(emulated, root, monkeypatch, caplog) -> None:
    folder = folder_of(root, "llama", "gptq")
    _, naive, wide = models(root, "llama", "gptq")

    usual = GptqCuda.refuses

    def refuses(cls, w, device):
        return "made up" if w.shape.in_features > w.shape.out_features else usual(w, device)

    monkeypatch.setattr(GptqCuda, "refuses", classmethod(refuses))
    with caplog.at_level("WARNING"):
        model = open_model(folder, "cuda", torch.float16)
    assert [record.message.count("made up") for record in caplog.records] == [1]
    kinds = {type(linear.kernel) for block in model.blocks for linear in block.linears}
    assert kinds == {GptqCuda, Reference}
    assert_as_good_as(run(model, IDS, []), run(naive, IDS, []), exact(wide, IDS), factor=3.0)
    assert "plain torch" in (model.why_not_recorded(new_cache(model, type=FP16)) or "")


def test_the_workspace_of_attention_ends_with_the_model_unless_a_recording_holds_it(emulated, root) -> None:
    model = models(root, "llama", "exl2")[0]
    kv = new_cache(model, type=FP16)
    batch = batch_of([([7], 0, [3])])
    held = model.held_by(batch)
    before = model.forward(batch, kv)
    space = weakref.ref(attention.workspace_on(model.device).partial)
    assert held[0] is attention.workspace_on(model.device)
    free_devices({model.device})
    assert space() is not None and attention.workspace_on(model.device) is not held[0]
    assert same_bits(model.forward(batch, kv), before)
    del held
    assert space() is None


def test_a_damaged_layer_is_named(emulated, root) -> None:
    folder = folder_of(root, "qwen3", "dense")
    model = open_model(folder, "cuda", torch.float16)
    model.blocks[1].norms.pre_mlp[3] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 1"):
        run(model, IDS[:5], [])


def test_what_waits_for_the_host_is_not_recorded(emulated, root) -> None:
    plain, experts = models(root, "llama", "exl2")[0], models(root, "mixtral", "dense")[0]
    assert plain.why_not_recorded(new_cache(plain, type=FP16)) is None
    assert "not of torch.float32" in (plain.why_not_recorded(new_cache(plain)) or "")
    assert "experts" in (experts.why_not_recorded(new_cache(experts, type=FP16)) or "")
