"""Encoded matrices against an independent packer, the format's own reader, and examples of the original program."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matrices import exl2_tensors
from oracles import same_bits
from quantize import exl2
from safetensors import safe_open

from convert import encoded as module
from convert.encoded import Encoded, check_layout, require_inputs, stored_bits, stored_shapes
from exl_runtime.errors import ConvertError, FormatError, NonFiniteError
from exl_runtime.formats import Exl2, LinearShape

HERE = Path(__file__).resolve().parent.parent / "data" / "vectors"
SHARED = HERE.parent.parent.parent.parent / "shared" / "vectors"
LAYOUTS = {
    "every width": ((8, 32), (6, 64), (5, 32), (4, 128), (3, 32), (2, 96)),
    "short last group": ((5, 64), (4, 64), (4, 64), (4, 32)),
    "one row block": ((3, 32),),
    "equal groups": ((6, 32), (6, 32), (6, 32)),
    **{f"{bits} bits": ((bits, 96), (bits, 32)) for bits in (2, 3, 4, 5, 6, 8)},
}


def random_matrix(layout: module.Layout, outputs: int, seed: int = 0) -> Encoded:
    """Every code, scale code and sign of a scale may occur; scales are small enough to be subnormal halves."""
    random = torch.Generator().manual_seed(seed)
    inputs = sum(rows for _, rows in layout)
    parts = [torch.randint(-(1 << b - 1), 1 << b - 1, (rows, outputs), generator=random) for b, rows in layout]
    return Encoded(
        layout=layout,
        codes=torch.cat(parts).to(torch.int8),
        scale_codes=torch.randint(1, 17, (len(layout), outputs), generator=random).to(torch.uint8),
        scale_max=(torch.randn(len(layout), generator=random) * 0.01).half(),
        perm=torch.randperm(inputs, generator=random),
    )


def vectors(folder: Path) -> list[Path]:
    return sorted(folder.glob("exl2_*.safetensors"))


def read_vector(path: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors, tensors.pop("expected")


@pytest.mark.parametrize("outputs", [64, 33, 1, 95, 31])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_format_reads_what_was_encoded(kind: str, outputs: int) -> None:
    matrix = random_matrix(LAYOUTS[kind], outputs, seed=outputs)
    tensors = matrix.tensors()
    read = Exl2.load(tensors, LinearShape(matrix.inputs, outputs)).dequantize()
    assert same_bits(read, matrix.weight())
    # Columns that are not there dequantize to zero, and exactly as the original's own padding is stored.
    padded = -(-outputs // 32) * 32
    whole = Exl2.load(tensors, LinearShape(matrix.inputs, padded))
    assert not whole.dequantize()[:, outputs:].any()
    assert (whole.scale_codes()[:, outputs:] == 1).all()
    again = Encoded.from_tensors(tensors, outputs)
    assert again.layout == matrix.layout
    for name in ("codes", "scale_codes", "scale_max", "perm"):
        assert torch.equal(getattr(again, name), getattr(matrix, name)), name


@pytest.mark.parametrize("outputs", [64, 40, 5])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_independent_packer_writes_the_same(kind: str, outputs: int) -> None:
    layout = LAYOUTS[kind]
    weight = np.random.default_rng(3).standard_normal((sum(rows for _, rows in layout), outputs)).astype(np.float32)
    theirs, dense = exl2(weight, list(layout), seed=1)
    ours = Encoded.from_tensors(theirs, outputs)
    assert ours.layout == layout
    assert same_bits(ours.weight().half(), torch.from_numpy(dense))
    packed = ours.tensors()
    assert packed.keys() == theirs.keys()
    for name, tensor in packed.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def check_vector(path: Path) -> None:
    tensors, expected = read_vector(path)
    matrix = Encoded.from_tensors(tensors, expected.shape[1])
    assert same_bits(matrix.weight().half(), expected)
    stored = matrix.tensors()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    bits += 0 if "q_invperm" in tensors else 32 * matrix.inputs
    assert stored_bits(matrix.layout, *expected.shape) == bits


@pytest.mark.parametrize("path", vectors(HERE), ids=lambda path: path.stem)
def test_bundled_examples_pack_to_the_same_bytes(path: Path) -> None:
    check_vector(path)


@pytest.mark.parametrize("path", vectors(SHARED), ids=lambda path: path.stem)
def test_shared_examples_pack_to_the_same_bytes(path: Path, shared: Path) -> None:
    check_vector(path)


@pytest.mark.parametrize("outputs", [64, 33, 1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_sizes_known_beforehand(kind: str, biased: bool, outputs: int) -> None:
    layout = LAYOUTS[kind]
    matrix = random_matrix(layout, outputs)
    tensors = matrix.tensors(torch.ones(outputs) if biased else None)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert stored_shapes(layout, outputs, biased=biased) == shapes
    on_disk = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert stored_bits(layout, matrix.inputs, outputs, biased=biased) == on_disk
    n, k, g = -(-outputs // 32) * 32, matrix.inputs, len(layout)  # the formula as formats/exl2.md 4.3 has it
    terms = [sum(rows * n * bits for bits, rows in layout), 16 * g, 32 * g, 4 * g * n, 32 * k, 16 * n * biased]
    assert on_disk == sum(terms)


def test_pure_four_bits_at_the_size_the_format_names() -> None:
    assert stored_bits(((4, 128),) * 32, 4096, 4096) / 4096**2 == pytest.approx(4.0392, abs=5e-5)


def test_a_matrix_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(LAYOUTS["every width"], 40)
    whole, weight = matrix.tensors(), matrix.weight()
    monkeypatch.setattr(module, "PIECE", 1)  # 32 rows at a time
    pieces = matrix.tensors()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)
    assert same_bits(matrix.weight(), weight)
    assert torch.equal(Encoded.from_tensors(whole, 40).codes, matrix.codes)


def test_rows_land_where_the_permutation_says() -> None:
    """By hand: stored row 0 belongs to model row 31; one code, one scale: 3 * 16 * 16 * (2 / 256) = 6."""
    codes = torch.zeros(32, 1, dtype=torch.int8)
    codes[0] = 3
    matrix = Encoded(
        layout=((4, 32),),
        codes=codes,
        scale_codes=torch.full((1, 1), 16, dtype=torch.uint8),
        scale_max=torch.tensor([2.0]).half(),
        perm=torch.arange(32).flip(0),
    )
    weight = matrix.weight()
    assert weight[31, 0] == 6 and weight.count_nonzero() == 1
    tensors = matrix.tensors(torch.tensor([0.1]))
    assert tensors["q_invperm"].tolist() == list(range(31, -1, -1))
    assert tensors["q_weight"][:, 0].tolist() == [0x8888888B - 2**32, *[0x88888888 - 2**32] * 3]
    assert tensors["q_scale"].tolist() == [[15, 0, 0, 0]]
    assert tensors["q_groups"].tolist() == [4, 0]
    assert tensors["bias"].dtype == torch.float16 and tensors["bias"].shape == (32,)
    assert tensors["bias"][0] == torch.tensor(0.1).half() and not tensors["bias"][1:].any()


def test_files_without_a_permutation() -> None:
    tensors = exl2_tensors([(4, 64), (2, 32)], 40, permuted=False)
    matrix = Encoded.from_tensors(tensors, 40)
    assert matrix.perm.tolist() == list(range(96))
    assert same_bits(matrix.weight(), Exl2.load(tensors, LinearShape(96, 40)).dequantize())


def test_damaged_tensors_are_refused_by_name() -> None:
    tensors = exl2_tensors([(4, 64)], 40)
    with pytest.raises(FormatError, match=r"layers\.3\.q"):
        Encoded.from_tensors({**tensors, "q_groups": torch.tensor([7, 0], dtype=torch.int16)}, 40, where="layers.3.q")
    with pytest.raises(FormatError, match="output features"):
        Encoded.from_tensors(tensors, 80)


# --- refusals ----------------------------------------------------------------------------------------------------

WRONG_LAYOUTS = {
    "empty": (),
    "unknown width": ((7, 64),),
    "rising widths": ((4, 32), (5, 32)),
    "half a block": ((4, 16), (4, 48)),
    "no rows": ((4, 64), (4, 0)),
    "too few rows": ((4, 32),),
    "too many rows": ((4, 96),),
}


@pytest.mark.parametrize("kind", WRONG_LAYOUTS)
def test_layouts_that_are_our_mistake(kind: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        check_layout(WRONG_LAYOUTS[kind], 64)
    with pytest.raises(ValueError, match="layout"):
        stored_bits(WRONG_LAYOUTS[kind], 64, 32)
    with pytest.raises(ValueError, match="layout"):
        replace(random_matrix(((4, 64),), 8), layout=WRONG_LAYOUTS[kind])


def test_a_layout_without_groups() -> None:
    with pytest.raises(ValueError, match="layout"):
        check_layout((), 0)


@pytest.mark.parametrize(
    "change",
    [
        {"codes": torch.zeros(64, 8)},
        {"codes": torch.zeros(64, 0, dtype=torch.int8)},
        {"codes": torch.zeros(64, dtype=torch.int8)},
        {"scale_codes": torch.ones(2, 8, dtype=torch.uint8)},
        {"scale_codes": torch.ones(1, 9, dtype=torch.uint8)},
        {"scale_max": torch.ones(1)},
        {"scale_max": torch.ones(2).half()},
        {"perm": torch.arange(64, dtype=torch.int32)},
        {"perm": torch.arange(63)},
    ],
    ids=lambda change: " ".join(f"{name} {tuple(t.shape)}" for name, t in change.items()),
)
def test_dtypes_and_shapes(change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(random_matrix(((4, 64),), 8), **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": torch.full((64, 8), 8, dtype=torch.int8)}, "do not fit"),
        ({"codes": torch.full((64, 8), -9, dtype=torch.int8)}, "do not fit"),
        ({"scale_codes": torch.zeros(1, 8, dtype=torch.uint8)}, "scale codes"),
        ({"scale_codes": torch.full((1, 8), 17, dtype=torch.uint8)}, "scale codes"),
        ({"perm": torch.zeros(64, dtype=torch.int64)}, "twice"),
        ({"perm": torch.arange(1, 65)}, "outside"),
        ({"perm": torch.arange(64) - 1}, "outside"),
    ],
    ids=["code 8", "code -9", "scale 0", "scale 17", "same row", "row 64", "row -1"],
)
def test_values_the_format_cannot_hold(change: dict[str, torch.Tensor], words: str) -> None:
    matrix = replace(random_matrix(((4, 64),), 8), **change)
    with pytest.raises(ValueError, match=words):
        matrix.tensors()


@pytest.mark.parametrize("largest", [float("nan"), float("inf"), 65504.0])
def test_weights_that_are_no_halves(largest: float) -> None:
    matrix = replace(random_matrix(((4, 64),), 8), scale_max=torch.tensor([largest]).half())
    with pytest.raises(NonFiniteError, match=r"layers\.3\.q"):
        matrix.tensors(where="layers.3.q")


def test_a_large_scale_is_fine_while_the_weights_are_halves() -> None:
    codes = torch.zeros(64, 8, dtype=torch.int8)
    codes[0] = -1
    matrix = replace(random_matrix(((4, 64),), 8), codes=codes, scale_max=torch.tensor([60000.0]).half())
    assert same_bits(Exl2.load(matrix.tensors(), LinearShape(64, 8)).dequantize(), matrix.weight())


def test_a_bias_beyond_half_precision() -> None:
    matrix = random_matrix(((4, 64),), 8)
    with pytest.raises(NonFiniteError, match="bias"):
        matrix.tensors(torch.full((8,), 70000.0))
    with pytest.raises(ValueError, match="bias"):
        matrix.tensors(torch.ones(9))


@pytest.mark.parametrize(("inputs", "words"), [(48, "multiple of 32"), (0, "multiple of 32"), (65568, "at most 65536")])
def test_matrices_that_no_reader_can_hold(inputs: int, words: str) -> None:
    with pytest.raises(ConvertError, match=words) as caught:
        require_inputs(inputs, "layers.3.q")
    assert "layers.3.q" in str(caught.value) and str(inputs) in str(caught.value)


def test_the_tallest_matrix_and_one_more_block() -> None:
    """65536 rows of 8 bits in groups of 32: the last first word row is 16376, which 15 bits hold."""
    require_inputs(65536, "m")
    layout = ((8, 32),) * 2048
    tensors = random_matrix(layout, 1).tensors()
    assert int(tensors["q_groups"].max()) == 16376 and tensors["q_weight"].shape[0] == 16384
    with pytest.raises(ConvertError, match="65568"):
        random_matrix((*layout, (2, 32)), 1).tensors()
