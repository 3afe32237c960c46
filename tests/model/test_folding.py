"""The order of down_proj's rows, folded into the columns of gate and up: visible, and not one bit of difference."""

import json
from pathlib import Path

import pytest
import torch
from driving import open_model, run
from oracles import same_bits
from quantize import quantize_folder
from safetensors.torch import load_file, save_file
from tiny import by_name, write

from exl_runtime.formats import LinearShape, load_linear
from exl_runtime.model import loader
from exl_runtime.model.mlp import Mlp
from exl_runtime.model.moe import Moe
from exl_runtime.model.transformer import Transformer

IDS = [(11 * i * i + 5 * i + 2) % 128 + 3 for i in range(40)]
ORDERED = {"bits": 4, "group_size": 32, "act_order": True, "symmetric": False, "version": 2}

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def native() -> None:
    from conftest import unavailable

    if why := unavailable("cpu"):
        pytest.skip(why)


def mlps(model: Transformer) -> list[Mlp]:
    found: list[Mlp] = []
    for block in model.blocks:
        found += block.mlp.experts if isinstance(block.mlp, Moe) else [block.mlp]
    return found


def both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Transformer, Transformer]:
    """The model as it is loaded, and with nothing folded."""
    folded = open_model(folder, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(loader, "repacked", lambda name: False)
        plain = open_model(folder, "cpu")
    assert all(mlp.inner_order is None for mlp in mlps(plain))
    return folded, plain


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("llama", "exl2", {}),
        ("gemma2", "exl2", {}),
        ("mixtral", "exl2", {}),
        ("llama", "gptq", ORDERED),
        ("phi3", "gptq", ORDERED),
    ],
)
def test_the_same_bits(name, kind, options, tmp_path, monkeypatch) -> None:
    quantize_folder(write(by_name(name), tmp_path), tmp_path / "q", kind, **options)
    folded, plain = both(tmp_path / "q", monkeypatch)
    assert same_bits(run(folded, IDS, [17, 18]), run(plain, IDS, [17, 18]))
    assert any(mlp.inner_order is not None for mlp in mlps(folded))


def test_what_lies_between_the_matrices_is_in_the_order_that_is_told(tmp_path, monkeypatch) -> None:
    quantize_folder(write(by_name("llama"), tmp_path), tmp_path / "q", "gptq", **ORDERED)
    stored = load_file(tmp_path / "q" / "output.safetensors")
    folded, plain = both(tmp_path / "q", monkeypatch)
    for number, (ours, theirs) in enumerate(zip(mlps(folded), mlps(plain), strict=True)):
        order = ours.inner_order
        assert order is not None and order.dtype == torch.int32
        assert sorted(order.tolist()) == list(range(theirs.gate.kernel.shape.out_features))
        x = torch.randn(3, theirs.gate.kernel.shape.in_features, generator=torch.Generator().manual_seed(number))
        assert same_bits(ours.gate(x), theirs.gate(x)[:, order.long()])
        assert same_bits(ours.up(x), theirs.up(x)[:, order.long()])
        inner = theirs.gate(x)
        assert same_bits(ours.down(inner[:, order.long()]), theirs.down(inner))
        assert torch.equal(ours.gate.kernel.output_order, order) and torch.equal(ours.down.kernel.input_order, order)
        # Rows by group, in their order inside a group: what activation order means.
        index = stored[f"model.layers.{number}.mlp.down_proj.g_idx"]
        assert order.tolist() == torch.argsort(index, stable=True).tolist()


def test_biases_come_along(tmp_path, monkeypatch) -> None:
    quantize_folder(write(by_name("llama"), tmp_path), tmp_path / "q", "gptq", **ORDERED)
    file = tmp_path / "q" / "output.safetensors"
    stored = load_file(file)
    for name in [name for name in stored if ".mlp." in name and name.endswith(".qweight")]:
        outputs = stored[name].shape[1]
        stored[name.replace("qweight", "bias")] = torch.randn(outputs).half()
    save_file(stored, file)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    folded, plain = both(tmp_path / "q", monkeypatch)
    for ours, theirs in zip(mlps(folded), mlps(plain), strict=True):
        assert same_bits(ours.gate.bias, theirs.gate.bias[ours.inner_order.long()])
        assert same_bits(ours.up.bias, theirs.up.bias[ours.inner_order.long()])
        assert same_bits(ours.down.bias, theirs.down.bias)
    assert same_bits(run(folded, IDS, []), run(plain, IDS, []))


def test_nothing_is_folded_around_a_matrix_that_is_not_repacked(tmp_path, monkeypatch) -> None:
    """One dense matrix among quantized ones: its columns stay in order, so all of them do."""
    quantize_folder(write(by_name("llama"), tmp_path), tmp_path / "q", "gptq", **ORDERED)
    file = tmp_path / "q" / "output.safetensors"
    stored = load_file(file)
    path = "model.layers.0.mlp.up_proj"
    tensors = {suffix: stored.pop(f"{path}.{suffix}") for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    shape = LinearShape(tensors["g_idx"].numel(), tensors["qweight"].shape[1])
    stored[f"{path}.weight"] = load_linear(tensors, shape, where="m").dequantize().t().half().contiguous()
    save_file(stored, file)
    folded, plain = both(tmp_path / "q", monkeypatch)
    assert mlps(folded)[0].inner_order is None and mlps(folded)[1].inner_order is not None
    assert same_bits(run(folded, IDS, []), run(plain, IDS, []))


def test_other_backends_keep_the_order_of_the_checkpoint(tmp_path) -> None:
    quantize_folder(write(by_name("llama"), tmp_path), tmp_path / "q", "exl2")
    assert all(mlp.inner_order is None for mlp in mlps(open_model(tmp_path / "q", "reference")))
