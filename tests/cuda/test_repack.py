"""Tiles: the layout that ext/cuda/tile.h draws, and codes, scales and zero-points without loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_matrices import EVERY_WIDTH, MATRICES, exl2, gptq, packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrices import exl2_tensors
from oracles import same_bits
from safetensors import safe_open
from torch import Tensor

from exl_runtime.formats import FormatHints, LinearShape, load_linear
from exl_runtime.formats.base import QuantFormat
from exl_runtime.formats.bits import pack_rows
from exl_runtime.ops import native

BUNDLED = Path(__file__).resolve().parent.parent / "data" / "vectors"
Card = Any


def weights(w: QuantFormat, device: torch.device, at_once: int = 1 << 20) -> Tensor:
    """float32 (K, N): what the tiles of `w` mean, `at_once` tile columns by a call."""
    matrix = packed(w, device).matrix
    columns, out = -(-matrix.outputs // 32), []
    for column in range(0, columns, at_once):
        count = min(at_once, columns - column)
        panel = torch.full((matrix.inputs, 32 * count), float("nan"), dtype=torch.float16, device=device)
        native.cuda_ops(device).linear_dequant(matrix.blob, matrix.rows, column, count, panel)
        out.append(panel)
    return torch.cat(out, dim=1)[:, : matrix.outputs].cpu()


def check(w: QuantFormat, device: torch.device) -> None:
    expected = w.dequantize().half()
    assert same_bits(weights(w, device) + 0.0, expected + 0.0)  # the sign of zero is nobody's business


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_layout_is_the_one_drawn(card: Card, bits: int) -> None:
    """Byte for byte against a literal reading of the drawing: one unit, one tile column."""
    codes = torch.randint(0, 1 << bits, (32, 32), generator=torch.Generator().manual_seed(bits))
    units = torch.tensor([[0, bits]], dtype=torch.int32)
    words, units = card.on(pack_rows(codes, bits), units)
    tiles = card.ops.linear_repack(words, None, units, 1, bits).cpu()

    planes = [4] * (bits // 4) + [2] * (bits // 2 % 2) + [1] * (bits % 2) if bits != 8 else [4, 4]
    expected, low = b"", 0
    for width in planes:
        for lane in range(32):
            g, t, number = lane // 4, lane % 4, 0
            for nh, kh, r, e in ((n, k, r, e) for n in (0, 1) for k in (0, 1) for r in range(4) for e in (0, 1)):
                column, position = 16 * nh + 8 * (r & 1) + g, 16 * kh + 8 * (r >> 1) + 2 * t + e
                field = int(codes[position, column]) >> low & (1 << width) - 1
                word, bit = {4: (2 * nh + kh, 4 * r), 2: (nh, 8 * kh + 2 * r), 1: (0, 4 * (2 * nh + kh) + r)}[width]
                number |= field << (32 * word + bit + 16 * e)
            expected += number.to_bytes(4 * width, "little")
        low += width
    assert bytes(tiles.flatten().tolist()) == expected


@pytest.mark.parametrize("name", MATRICES)
def test_weights_are_the_formats_own(card: Card, name: str) -> None:
    check(MATRICES[name](), card.device)


def test_weights_in_panels(card: Card) -> None:
    w = exl2(EVERY_WIDTH, 150)
    whole = weights(w, card.device)
    for at_once in (1, 2, 3):
        assert same_bits(weights(w, card.device, at_once), whole)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=1, max_size=6),
    blocks=st.lists(st.sampled_from([1, 2, 3, 5]), min_size=6, max_size=6),
    outputs=st.integers(1, 70),
    permuted=st.booleans(),
)
def test_any_exl2_layout(emulated: Card, widths: list[int], blocks: list[int], outputs: int, permuted: bool) -> None:
    layout = [(bits, 32 * count) for bits, count in zip(sorted(widths, reverse=True), blocks, strict=False)]
    check(exl2(layout, outputs, permuted), emulated.device)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 3),
    group_size=st.sampled_from([-1, 8, 20, 32, 64, 100, 128, 200]),
    act_order=st.booleans(),
    version=st.sampled_from([1, 2]),
)
def test_any_gptq_layout(
    emulated: Card, bits: int, inputs: int, outputs: int, group_size: int, act_order: bool, version: int
) -> None:
    check(gptq(bits, 32 * inputs, 32 * outputs, group_size, act_order, version), emulated.device)


def read_vector(path: Path) -> tuple[QuantFormat, Tensor]:
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    expected = tensors.pop("expected")
    declared = None
    if about["format"] == "gptq":
        word = about["v1_decode"] == "word"
        declared = {
            "quant_method": "gptq",
            "bits": int(about["bits"]),
            "group_size": int(about["group_size"]),
            "checkpoint_format": "gptq_v2" if about["zeros"] == "v2" else "gptq",
            "sym": not word,
            "meta": {"quantizer": ["gptqmodel:7.7.0"]} if word else {},
        }
    shape = LinearShape(*expected.shape)
    return load_linear(tensors, shape, where=path.stem, hints=FormatHints.from_json(declared)), expected


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_weights_of_the_bundled_vectors(card: Card, path: Path) -> None:
    w, expected = read_vector(path)
    assert same_bits(weights(w, card.device) + 0.0, expected + 0.0)


def test_subnormal_scales_survive(card: Card) -> None:
    tensors = exl2_tensors([(8, 32), (4, 32)], 32)
    tensors["q_scale_max"] = torch.tensor([1e-3, 2e-5]).half()
    w = load_linear(tensors, LinearShape(64, 32), where="m")
    assert 0 < w.dequantize()[w.dequantize() != 0].abs().min() < 2**-14
    check(w, card.device)


def test_the_operators_say_what_is_wrong(card: Card) -> None:
    words, units = card.on(torch.zeros(4, 32, dtype=torch.int32), torch.tensor([[0, 4]], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="units of 5 word rows in order"):
        card.ops.linear_repack(words, None, units, 1, 5)
    with pytest.raises(RuntimeError, match="words must be a contiguous"):
        card.ops.linear_repack(words.float(), None, units, 1, 4)
    tiles = card.ops.linear_repack(words, None, units, 1, 4)
    scales = torch.zeros(1, 1, 64, dtype=torch.uint8, device=card.device)
    with pytest.raises(RuntimeError, match=r"scales must have shape \(1, \*, 16\)"):
        card.ops.linear_matrix(tiles, scales, units, None, 0, 0, 4, 32)
    with pytest.raises(RuntimeError, match=r"tiles must have shape \(2, \*\)"):
        card.ops.linear_matrix(tiles, scales, units, None, 1, 0, 4, 33)
    with pytest.raises(RuntimeError, match="matrix was not made by"):
        out = torch.zeros(32, 32, dtype=torch.float16, device=card.device)
        card.ops.linear_dequant(torch.zeros(100, dtype=torch.uint8), None, 0, 1, out)
    blob = card.ops.linear_matrix(tiles, scales, units, None, 1, 0, 4, 32)
    with pytest.raises(RuntimeError, match="tile columns 1 to 2 of 32 outputs"):
        card.ops.linear_dequant(blob, None, 1, 1, out)
