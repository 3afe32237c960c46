"""Mixtures of experts inside the native pass: the bits of `model.moe.Moe`, whoever else is in the batch."""

from pathlib import Path

import pytest
import torch
from conftest import unavailable
from driving import batch_of, new_cache, open_model
from quantize import quantize_folder
from stepping import IDS, assert_same
from tiny import Family, by_name, model_of, write

from exl_runtime.errors import NonFiniteError
from exl_runtime.model.moe import Moe
from exl_runtime.model.transformer import Transformer
from exl_runtime.ops import native
from exl_runtime.ops.linear.packed_cpu import PackedCpu

# 270 tokens at 5 of 7 experts are more visits than the native pass takes at once, and cut an expert in two.
CROWDED = Family("crowded", "MixtralConfig", {"num_local_experts": 7, "num_experts_per_tok": 5, "sliding_window": None})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("step_moe")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if why := unavailable("cpu"):
        pytest.skip(why)


@pytest.fixture(scope="module")
def crowded(root: Path) -> Path:
    model_of(CROWDED).save_pretrained(root / "crowded", safe_serialization=True)
    return root / "crowded"


@pytest.fixture(scope="module")
def packed(crowded: Path, root: Path) -> Path:
    quantize_folder(crowded, root / "packed", "exl2", rounded=False)
    return root / "packed"


def kernels(model: Transformer) -> list[PackedCpu]:
    """Of all experts."""
    found = [linear.kernel for block in model.blocks if isinstance(block.mlp, Moe) for linear in block.mlp.linears]
    return [kernel for kernel in found if isinstance(kernel, PackedCpu)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["crowded", "packed"])
def test_more_visits_than_are_taken_at_once(kind, threads, request, monkeypatch) -> None:
    before = native.ops().set_threads(0)
    native.ops().set_threads(threads)
    try:
        assert_same(open_model(request.getfixturevalue(kind), "cpu"), monkeypatch)
    finally:
        native.ops().set_threads(before)


def test_experts_that_trade_accuracy_for_speed(packed, monkeypatch) -> None:
    """Whether an expert's rows keep the residual is decided by their number, and not alike for all of its matrices."""
    model = open_model(packed, "cpu")
    found = kernels(model)
    assert len(found) == 3 * 3 * 7
    for number, kernel in enumerate(found):
        kernel.residual = (0, 8, 1 << 62, 150)[number % 4]
    assert_same(model, monkeypatch)


@pytest.mark.parametrize("kind", ["crowded", "packed"])
def test_a_row_has_the_same_bits_in_any_batch(kind, request) -> None:
    model = open_model(request.getfixturevalue(kind), "cpu")
    assert model.step is not None
    whole = model.forward(batch_of([(IDS[:250], 0, [3])]), new_cache(model))
    kv, parts = new_cache(model), []
    for start, stop in ((0, 1), (1, 2), (2, 19), (19, 200), (200, 250)):
        beside = (IDS[start + 7 : stop + 7], start, [4])
        batch = batch_of([(IDS[start:stop], start, [3]), beside])
        parts.append(model.forward(batch, kv)[: stop - start])
    assert torch.equal(torch.cat(parts), whole)


def test_a_matrix_of_an_expert_that_is_dense_stands_beside_packed_ones(crowded, packed, monkeypatch) -> None:
    model, other = open_model(packed, "cpu"), open_model(crowded, "cpu")
    for block, plain in zip(model.blocks, other.blocks, strict=True):
        assert isinstance(block.mlp, Moe) and isinstance(plain.mlp, Moe)
        block.mlp.experts[2] = plain.mlp.experts[2]
        block.mlp.experts[4].gate = plain.mlp.experts[4].gate
    model.forget_step()
    assert_same(model, monkeypatch)


def test_a_damaged_expert_is_named_by_its_layer(root) -> None:
    model = open_model(write(by_name("qwen3_moe"), root), "cpu")
    mixture = model.blocks[2].mlp
    assert isinstance(mixture, Moe) and model.step is not None
    for expert in mixture.experts:
        expert.down.kernel.weight[5] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 2 gives NaN"):
        model.forward(batch_of([(IDS[:4], 0, [0])]), new_cache(model))


def test_a_damaged_router_is_named_by_its_layer(root) -> None:
    model = open_model(write(by_name("mixtral"), root), "cpu")
    mixture = model.blocks[1].mlp
    assert isinstance(mixture, Moe) and model.step is not None
    mixture.router.kernel.weight[3, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 1 gives NaN"):
        model.forward(batch_of([(IDS[:4], 0, [0])]), new_cache(model))


def test_shapes_that_do_not_fit_are_refused(root) -> None:
    model = open_model(write(by_name("mixtral"), root), "cpu")
    mixture = model.blocks[0].mlp
    assert isinstance(mixture, Moe)
    mixture.experts[1].down, mixture.experts[1].up = mixture.experts[1].up, mixture.experts[1].down
    with pytest.raises(RuntimeError, match="up must be 64 x 96, got 96 x 64"):
        _ = model.step
    mixture.experts[1].down, mixture.experts[1].up = mixture.experts[1].up, mixture.experts[1].down
    mixture.experts.pop()
    with pytest.raises(RuntimeError, match="router must be 64 x 3, got 64 x 4"):
        _ = model.step
