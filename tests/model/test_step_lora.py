"""Adapters inside the native pass: the bits of `model.adapted`, whoever else is in the batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import Driven, linears_of, shapes_of, write_adapter
from conftest import unavailable
from driving import batch_of, new_cache, open_model
from quantize import quantize_folder
from stepping import IDS
from tiny import by_name, model_of, write

import exl_runtime as exl
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP32
from exl_runtime.errors import NonFiniteError
from exl_runtime.model.adapter_loading import load_adapter
from exl_runtime.model.lora import Adapter, mix_of
from exl_runtime.model.placement import geometry_of
from exl_runtime.model.transformer import Transformer
from exl_runtime.ops import native
from exl_runtime.ops.step import AdapterChange, Program

HEAD = ("lm_head", "q_proj", "down_proj")
GPTQ = {"bits": 4, "group_size": 32, "act_order": True, "symmetric": False, "version": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("step_lora")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if why := unavailable("cpu"):
        pytest.skip(why)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters each native pass was given."""
    counts: list[int] = []
    original = Program.share
    monkeypatch.setattr(
        Program, "share", lambda self, adapters, *rest: counts.append(len(adapters)) or original(self, adapters, *rest)
    )
    return counts


def loaded(root: Path, family: str, model: Transformer, seed: int, wanted: tuple[str, ...] = ()) -> Adapter:
    shapes = linears_of(model_of(by_name(family)), wanted) if wanted else linears_of(model_of(by_name(family)))
    return load_adapter(write_adapter(root / f"{family}-{seed}", shapes, seed=seed), model)


def passes(model: Transformer, one: Adapter, two: Adapter) -> list[torch.Tensor]:
    """Logits and cache of a few passes: a prompt, then ragged batches with a mix for every sequence."""
    kv, found = new_cache(model), []
    rope = model.spec.rope_length(300)
    first = mix_of([(one, 0.75)])
    both, last = mix_of([(two, -0.5), (one, 1.0)]), mix_of([(two, 1.0)])
    for sequences, mixes in (
        ([(IDS[:270], 0, [3, 1])], [first]),
        ([(IDS[270:271], 270, [3, 1])], [first]),
        ([(IDS[271:274], 271, [3, 1]), (IDS[:9], 0, [5]), (IDS[40:59], 0, [4])], [first, (), both]),
        (
            [(IDS[274:275], 274, [3, 1]), (IDS[9:10], 9, [5]), (IDS[59:60], 19, [4])],
            [first, last, both],
        ),
    ):
        batch = batch_of(sequences, rope_length=rope, all_logits=len(sequences[0][0]) < 100)
        found.append(Driven(model, mixes=tuple(mixes)).forward(batch, kv))
    return [*found, kv.keys, kv.values]


def by_operators(model: Transformer, monkeypatch: pytest.MonkeyPatch, one: Adapter, two: Adapter) -> list[torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr("exl_runtime.model.transformer.native_step", lambda *parts, **options: None)
        model.forget_step()
        found = passes(model, one, two)
    model.forget_step()
    return found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", ""),
        ("llama_bias", ""),
        ("qwen3", ""),
        ("gemma2", ""),
        ("phi3", ""),
        ("llama", "exl2"),
        ("llama", "gptq"),
    ],
)
def test_the_bits_of_the_operators(family, kind, threads, root, monkeypatch, shared) -> None:
    folder = write(by_name(family), root)
    if kind:
        target = root / f"{family}-{kind}"
        if not target.exists():
            quantize_folder(folder, target, kind, rounded=False, **(GPTQ if kind == "gptq" else {}))
        folder = target
    model = open_model(folder, "cpu")
    one, two = (loaded(root, family, model, seed) for seed in (1, 2))
    before = native.ops().set_threads(0)
    native.ops().set_threads(threads)
    try:
        ours = passes(model, one, two)
        assert shared == [1, 1, 2, 2]
        wanted = by_operators(model, monkeypatch, one, two)
    finally:
        native.ops().set_threads(before)
    assert shared == [1, 1, 2, 2]
    for number, (got, exact) in enumerate(zip(ours, wanted, strict=True)):
        assert torch.equal(got, exact), f"part {number}"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_attention_and_the_head_alone(family, root, monkeypatch, shared) -> None:
    """Also beside experts, which themselves are not changed."""
    model = open_model(write(by_name(family), root), "cpu")
    wanted = HEAD if family == "llama" else ("lm_head", "q_proj", "o_proj")
    one, two = loaded(root, family, model, 3, wanted), loaded(root, family, model, 4, ("v_proj",))
    ours = passes(model, one, two)
    assert shared == [1, 1, 2, 2]
    for got, exact in zip(ours, by_operators(model, monkeypatch, one, two), strict=True):
        assert torch.equal(got, exact)
    kv, other = new_cache(model), new_cache(model)
    plain = model.forward(batch_of([(IDS[:5], 0, [0])]), kv)
    adapted = Driven(model, mix_of([(one, 1.0)])).forward(batch_of([(IDS[:5], 0, [0])]), other)
    assert not torch.equal(plain, adapted)
    assert torch.equal(model.forward(batch_of([(IDS[:5], 0, [0])]), kv), plain), "a pass has only its own adapters"


def test_window_layers_with_pages_of_their_own(root, shared) -> None:
    model = open_model(write(by_name("gemma2"), root), "cpu")
    mix = mix_of([(loaded(root, "gemma2", model, 1), 1.0)])
    batch = batch_of([(IDS[:40], 0, [3])])
    groups = KVStorage(geometry_of(model.spec, FP32, context=2048), (6, 6), "cpu")
    assert len(groups.counts) == 2
    apart = replace(batch, slots=batch.slots.repeat(2), pages=batch.pages.repeat(2, 1))
    found = Driven(model, mix).forward(apart, groups)
    assert torch.equal(found, Driven(model, mix).forward(batch, new_cache(model)))
    assert shared == [1, 1]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.1, "min_p": 0.02, "seed": 5}], ids=str)
def test_replies_do_not_depend_on_who_draws(sampling, tmp_path, monkeypatch, demo) -> None:
    """Requests with different adapters beside one without, drawn natively, from logits, and operator by operator."""
    calls = []
    original = Transformer.draw_plan

    def counted(self, plan, *rest):
        calls.append(plan)
        return original(self, plan, *rest)

    monkeypatch.setattr(Transformer, "draw_plan", counted)
    params = exl.SamplingParams(ignore_eos=True, **sampling)
    loras = [{"one": 1.0}, {}, {"one": 0.5, "two": -0.5}]

    def replies() -> list[list[int]]:
        with exl.load(demo, context=512, threads=1, speculate="off") as rt:
            for seed, name in enumerate(("one", "two")):
                shapes = shapes_of(rt._engine().model, ("q_proj", "down_proj"))
                rt.load_lora(write_adapter(tmp_path / name, shapes, seed=seed), name)
            alone = [rt.generate("Once upon", max_tokens=24, sampling=params, lora=lora).ids for lora in loras]
            together = rt.generate(["Once upon", "The fox"], max_tokens=24, sampling=params, lora=loras[0])
        return [*alone, *(result.ids for result in together)]

    ours = replies()
    assert any(plan.mixes for plan in calls) and len({tuple(ids) for ids in ours}) == 4
    monkeypatch.setattr(Transformer, "draws", False)
    assert replies() == ours
    monkeypatch.setattr("exl_runtime.model.transformer.native_step", lambda *parts, **options: None)
    assert replies() == ours


def test_a_pass_that_is_refused_leaves_no_adapter_behind(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    mix = mix_of([(loaded(root, "llama", model, 1), 1.0)])
    good, kv = batch_of([(IDS[:4], 0, [0])]), new_cache(model)
    plain = model.forward(good, kv)
    with pytest.raises(RuntimeError, match=r"tokens\[2\] is 131"):
        Driven(model, mix).forward(replace(good, tokens=torch.tensor([3, 4, 131, 5])), kv)
    assert torch.equal(model.forward(good, kv), plain)


def test_a_damaged_adapter_is_named_by_its_layer(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    adapter = loaded(root, "llama", model, 5)
    adapter.changes[1, "down_proj"][0].up.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 1 gives NaN"):
        Driven(model, mix_of([(adapter, 1.0)])).forward(batch_of([(IDS[:4], 0, [0])]), new_cache(model))


def test_an_adapter_goes_with_its_owner(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    step = model.step
    assert step is not None
    change = AdapterChange(0, torch.randn(2, 64), torch.randn(64, 2), 1.0)
    owner = torch.nn.Identity()
    number = step.program.adapter([change], owner)
    step.program.share([number], [1.0])
    del owner
    with pytest.raises(RuntimeError, match=f"there is no adapter {number}"):
        step.program.share([number], [1.0])


def test_what_makes_no_sense_is_refused(root) -> None:
    model = open_model(write(by_name("mixtral"), root), "cpu")
    step = model.step
    assert step is not None
    program = step.program
    good = AdapterChange(0, torch.randn(2, 64), torch.randn(64, 2), 1.0)
    for change, why in (
        (replace(good, place=4), "no matrix at place 4"),  # the router
        (replace(good, place=22), "no matrix at place 22"),
        (replace(good, place=-1), "no matrix at place -1"),
        (replace(good, down=torch.randn(2, 63)), r"down must have shape \(\*, 64\)"),
        (replace(good, up=torch.randn(64, 3)), r"up must have shape \(64, 2\)"),
        (replace(good, down=torch.randn(0, 64), up=torch.randn(64, 0)), "rank 0"),
        (replace(good, down=good.down.double()), "dtype Float, Half or BFloat16"),
        (replace(good, scale=torch.inf), "scale inf"),
    ):
        with pytest.raises(RuntimeError, match=why):
            program.adapter([change], model)
    number = program.adapter([good], model)
    program.share([number], [1.0, 2.0])
    with pytest.raises(RuntimeError, match="2 weights for 1 adapters and 1 sequences"):
        model.forward(batch_of([(IDS[:3], 0, [0])]), new_cache(model))
