"""The native pass against the operators called one by one: the same bits, whatever the model, cache and batch."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import unavailable
from driving import batch_of, new_cache, open_model
from quantize import quantize_folder
from stepping import IDS, assert_same, passes
from tiny import FAMILIES, by_name, write

from exl_runtime.cache.types import FP32, cache_type
from exl_runtime.errors import NonFiniteError
from exl_runtime.model.placement import geometry_of
from exl_runtime.ops import native


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("step")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if why := unavailable("cpu"):
        pytest.skip(why)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_the_bits_of_its_operators(family, root, monkeypatch) -> None:
    assert_same(open_model(write(family, root), "cpu"), monkeypatch)


@pytest.mark.parametrize("name", ["fp16", "bf16", "q8", "q4", "k6v3"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_every_cache(family, name, root, monkeypatch) -> None:
    assert_same(open_model(write(by_name(family), root), "cpu"), monkeypatch, cache_type(name))


@pytest.mark.parametrize("name", ["fp32", "q8"])
@pytest.mark.parametrize(
    ("family", "groups"), [("gemma2", 2), ("gemma3", 2), ("qwen2_window", 2), ("mistral", 1), ("phi3", 1)]
)
def test_window_layers_with_pages_of_their_own(family, groups, name, root, monkeypatch) -> None:
    model = open_model(write(by_name(family), root), "cpu")
    found = geometry_of(model.spec, FP32, 2048).groups
    assert len(found) == groups and found[-1].window is not None
    assert_same(model, monkeypatch, cache_type(name), context=2048)
    # What they keep less changes nothing.
    for part, whole in zip(passes(model, FP32, 2048), passes(model, FP32), strict=True):
        assert torch.equal(part[0], whole[0])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("llama", "exl2", {}),
        ("qwen2", "exl2", {}),
        ("gemma3", "exl2", {}),
        ("mixtral", "exl2", {}),
        ("qwen3_moe", "exl2", {}),
        ("mixtral", "gptq", {"bits": 4, "group_size": 32, "act_order": False, "symmetric": True, "version": 1}),
        ("qwen3_moe", "gptq", {"bits": 8, "group_size": 32, "act_order": True, "symmetric": False, "version": 1}),
        ("phi3", "gptq", {"bits": 4, "group_size": 32, "act_order": True, "symmetric": True, "version": 1}),
        ("llama_bias", "gptq", {"bits": 3, "group_size": 64, "act_order": False, "symmetric": False, "version": 2}),
    ],
)
def test_packed_matrices_on_any_number_of_threads(family, kind, options, threads, root, monkeypatch) -> None:
    target = root / f"{family}-{kind}"
    if not target.exists():
        quantize_folder(write(by_name(family), root), target, kind, rounded=False, **options)
    before = native.ops().set_threads(0)
    native.ops().set_threads(threads)
    try:
        assert_same(open_model(target, "cpu"), monkeypatch, cache_type("q8"))
    finally:
        native.ops().set_threads(before)


def test_a_part_that_was_replaced_is_used_after_forget_step(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    batch, kv = batch_of([(IDS[:4], 0, [0])]), new_cache(model)
    before = model.forward(batch, kv)
    model.final_norm = model.final_norm * 2
    model.forget_step()
    assert torch.equal(model.forward(batch, kv), before * 2)


def test_a_damaged_layer_is_named(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    model.blocks[1].norms.pre_mlp[5] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 1 gives NaN"):
        model.forward(batch_of([(IDS[:4], 0, [0])]), new_cache(model))


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_written(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    good, kv = batch_of([(IDS[:4], 0, [0])]), new_cache(model)
    for part, value, why in (
        ("tokens", torch.tensor([3, 4, 131, 5]), r"tokens\[2\] is 131"),
        ("slots", torch.tensor([0, 1, 2, 6 * 256]), r"slots\[3\] is 1536"),
        ("logit_rows", torch.tensor([4]), r"logit_rows\[0\] is 4"),
        ("pages", torch.tensor([[6]], dtype=torch.int32), "wants page 6 of 6"),
        ("kv_lengths", torch.tensor([3], dtype=torch.int32), "4 queries, 3 keys"),
        ("q_starts", torch.tensor([0, 3], dtype=torch.int32), "must run from 0 to 4"),
    ):
        with pytest.raises(RuntimeError, match=why):
            model.forward(replace(good, **{part: value}), kv)
    assert not kv.keys.any() and not kv.values.any()


def test_the_times_of_a_pass_are_told_by_phase(root) -> None:
    model = open_model(write(by_name("llama"), root), "cpu")
    assert model.step is not None
    program = model.step.program
    batch, kv = batch_of([(IDS[:4], 0, [0])]), new_cache(model)
    model.forward(batch, kv)
    assert not any(program.times(True).values())  # nobody had asked
    model.forward(batch, kv)
    spent = program.times(False)
    assert {"project", "attend", "mlp", "head"} <= {name for name, seconds in spent.items() if seconds > 0}
    model.forward(batch, kv)
    assert not any(program.times(False).values())


THREADS = """
import os, sys
import torch
import exl_runtime as exl
torch.set_num_threads(2)
def threads():
    return {task: open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")}
with exl.load(sys.argv[1], threads=2, context=2048, speculate="off") as runtime:
    before = threads()
    runtime.generate([5 + i % 900 for i in range(1500)], max_tokens=4)
    print([name for task, name in threads().items() if task not in before])
"""


def test_a_pass_wakes_no_threads_of_torch(demo: Path, repo: Path) -> None:
    """In a process of its own: libgomp never lets its threads go."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads are counted in /proc")
    found = subprocess.run(
        [sys.executable, "-c", THREADS, str(demo)],
        check=True,
        capture_output=True,
        text=True,
        cwd=repo,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert set(ast.literal_eval(found.stdout)) <= {"exl-worker", "exl-ahead"}
