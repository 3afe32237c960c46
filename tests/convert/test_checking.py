"""Every tensor is looked at before any work."""

from pathlib import Path

import pytest
import torch
from converting import small_model, tensors
from safetensors.torch import save_file

from convert.checking import check_weights, half, require_half
from convert.source import Source
from exl_runtime.errors import NonFiniteError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model("mixtral", tmp_path_factory.mktemp("models"))


def test_every_tensor_is_looked_at(folder: Path, tmp_path: Path) -> None:
    """Spoil each tensor of a model in turn: its name is said."""
    whole = tensors(folder)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    layers = []
    for name in whole:
        spoiled = {other: tensor.clone() for other, tensor in whole.items()}
        spoiled[name].view(-1)[-1] = -65520.0
        save_file(spoiled, tmp_path / "model.safetensors")
        with Source.open(tmp_path) as source, pytest.raises(NonFiniteError) as caught:
            check_weights(source, lambda: layers.append(1))
        assert f"{name} holds -65520" in caught.value.problem and str(tmp_path) in caught.value.problem
    assert layers
    save_file(whole, tmp_path / "model.safetensors")
    layers.clear()
    with Source.open(tmp_path) as source:
        check_weights(source, lambda: layers.append(1))
        assert len(layers) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 65505.0, -1e30])
def test_what_half_precision_cannot_hold(value: float, folder: Path) -> None:
    with Source.open(folder) as source:
        with pytest.raises(NonFiniteError, match=f"w holds {value:g}".replace("+", r"\+")):
            require_half(torch.tensor([1.0, value]), "w", source)
        for fine in (torch.tensor([65504.0, -65504.0, 1e-30]), torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)):
            require_half(fine, "w", source)


def test_half() -> None:
    assert torch.equal(half(torch.tensor([1.0, 65519.0]), "w"), torch.tensor([1.0, 65504.0]).half())
    for bad in (65520.0, float("nan"), float("-inf")):
        with pytest.raises(NonFiniteError, match="w: "):
            half(torch.tensor([bad]), "w")
