"""Every worked example of the formats, bit for bit: written by the original programs, not by this project."""

from pathlib import Path

import pytest
import torch
from oracles import same_bits
from safetensors import safe_open

from exl_runtime.formats import FormatHints, LinearShape, dequantize, load_linear

HERE = Path(__file__).resolve().parent.parent / "data" / "vectors"
SHARED = HERE.parent.parent.parent.parent / "shared" / "vectors"


def quantized(folder: Path) -> list[Path]:
    return sorted([*folder.glob("exl2_*.safetensors"), *folder.glob("gptq_*.safetensors")])


def read(path: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, object] | None]:
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    expected = tensors.pop("expected")
    if about["format"] == "exl2":
        return tensors, expected, None
    declared: dict[str, object] = {
        "quant_method": "gptq",
        "bits": int(about["bits"]),
        "group_size": int(about["group_size"]),
        "desc_act": about["desc_act"] == "True",
        "checkpoint_format": "gptq_v2" if about["zeros"] == "v2" else "gptq",
        "sym": True,
    }
    if about["v1_decode"] == "word":
        declared |= {"sym": False, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    return tensors, expected, declared


def check(path: Path) -> None:
    tensors, expected, declared = read(path)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    weight = dequantize(tensors, declared)
    assert weight.dtype == torch.float32
    assert same_bits(weight.half(), expected)
    assert torch.equal(weight, weight.half().float()), "a weight is not a half"
    assert all(torch.equal(tensors[name], before[name]) for name in before), "the input was edited"

    matrix = load_linear(tensors, LinearShape(*expected.shape), where=path.name, hints=FormatHints.from_json(declared))
    stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert matrix.storage_bits() == stored
    outputs = expected.shape[1]
    for start, stop in ((0, outputs), (8, 40), (5, 6), (outputs - 33, outputs - 1)):
        assert same_bits(matrix.columns(start, stop).dequantize().half(), expected[:, start:stop])


@pytest.mark.parametrize("path", quantized(HERE), ids=lambda path: path.stem)
def test_bundled_vector(path: Path) -> None:
    check(path)


def test_bundled_set_covers_every_width() -> None:
    names = [path.stem for path in quantized(HERE)]
    assert {name[5:7] for name in names if name.startswith("gptq")} == {"b2", "b3", "b4", "b8"}
    assert len(names) >= 12 and sum(path.stat().st_size for path in quantized(HERE)) < 1_000_000


@pytest.mark.parametrize("path", quantized(SHARED), ids=lambda path: path.stem)
def test_shared_vector(path: Path, shared: Path) -> None:
    check(path)


def test_absent_permutation_is_the_identity() -> None:
    tensors, _, _ = read(HERE / "exl2_all_widths.safetensors")
    invperm = tensors.pop("q_invperm").long()
    with_order = dequantize({**tensors, "q_invperm": invperm.to(torch.int32)})
    assert torch.equal(dequantize(tensors)[invperm], with_order)
    identity = torch.arange(invperm.numel(), dtype=torch.int32)
    assert torch.equal(dequantize(tensors), dequantize({**tensors, "q_invperm": identity}))


def test_stored_q_perm_is_ignored() -> None:
    tensors, expected, _ = read(HERE / "exl2_b2_g64.safetensors")
    wrong = torch.zeros(expected.shape[0], dtype=torch.int32)
    assert same_bits(dequantize({**tensors, "q_perm": wrong}).half(), expected)
