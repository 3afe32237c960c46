"""EXL2 against blocks worked out by hand with Python integers and numpy halves."""

import numpy as np
import pytest
import torch
from matrices import exl2_tensors

from exl_runtime.errors import NonFiniteError
from exl_runtime.formats.base import LinearShape
from exl_runtime.formats.exl2 import Exl2, Group

LAYOUT = [(8, 32), (6, 64), (5, 32), (4, 128), (3, 32), (2, 96)]
ROWS = sum(rows for _, rows in LAYOUT)


def load(tensors: dict[str, torch.Tensor], inputs: int, outputs: int) -> Exl2:
    return Exl2.load(tensors, LinearShape(inputs, outputs), where="m")


def by_hand(tensors: dict[str, torch.Tensor], inputs: int, outputs: int) -> np.ndarray:
    """Element by element: one big integer per column and group, numpy half arithmetic (every product rounded once)."""
    table = [value & 0xFFFF for value in tensors["q_groups"].tolist()]
    ends = [*table[3::2], tensors["q_weight"].shape[0]]
    stored = []
    for g, (bits, start, end) in enumerate(zip(table[0::2], table[1::2], ends, strict=True)):
        scale_max = np.float16(np.float32(tensors["q_scale_max"][g].item()) / np.float32(256))
        words = [[word & 0xFFFFFFFF for word in row] for row in tensors["q_weight"][start:end].tolist()]
        block = np.zeros(((end - start) * 32 // bits, outputs), dtype=np.float16)
        for n in range(outputs):
            number = sum(row[n] << (32 * t) for t, row in enumerate(words))
            code = ((int(tensors["q_scale"][g, n // 8]) & 0xFFFFFFFF) >> (4 * (n % 8))) & 15
            scale = np.float16((code + 1) ** 2) * scale_max
            for i in range(block.shape[0]):
                value = (number >> (i * bits)) & ((1 << bits) - 1)
                block[i, n] = np.float16(value - (1 << (bits - 1))) * scale
        stored.append(block)
    rows = np.concatenate(stored)
    return rows[tensors["q_invperm"].numpy()] if "q_invperm" in tensors else rows


@pytest.mark.parametrize("outputs", [32, 33, 1, 95])
@pytest.mark.parametrize("permuted", [True, False])
def test_against_a_block_by_hand(outputs: int, permuted: bool) -> None:
    tensors = exl2_tensors(LAYOUT, outputs, seed=outputs, permuted=permuted)
    weight = load(tensors, ROWS, outputs).dequantize()
    expected = by_hand(tensors, ROWS, outputs)
    assert weight.shape == (ROWS, outputs)  # padding columns are gone
    assert np.array_equal(weight.half().numpy().view(np.int16), expected.view(np.int16))


def test_the_three_roundings_do_not_merge() -> None:
    """q_scale_max 0.001: M is 66 * 2^-24, a subnormal; rounding only at the end would give other weights."""
    tensors = exl2_tensors([(4, 32)], 32)
    tensors["q_scale_max"] = torch.tensor([0.001]).half()
    matrix = load(tensors, 32, 32)
    assert matrix.group_scales().item() == 66 * 2.0**-24
    codes = torch.arange(1, 17).double() ** 2
    merged = (codes[(matrix.scale_codes() - 1).long()] * 0.001 / 256).half().float()
    assert not torch.equal(matrix.scales(), merged)
    expected = by_hand(tensors, 32, 32)
    assert np.array_equal(matrix.dequantize().half().numpy().view(np.int16), expected.view(np.int16))


def test_zero_scale_keeps_the_sign_of_zero() -> None:
    tensors = exl2_tensors([(2, 32)], 32)
    tensors["q_scale_max"] = torch.tensor([1e-6]).half()  # M rounds to 0
    weight = load(tensors, 32, 32).dequantize()
    expected = by_hand(tensors, 32, 32)
    assert not weight.any() and (weight.half().view(torch.int16) < 0).any()
    assert np.array_equal(weight.half().numpy().view(np.int16), expected.view(np.int16))


def test_group_table_for_kernels() -> None:
    groups = load(exl2_tensors(LAYOUT, 32), ROWS, 32).groups
    assert groups[:3] == (Group(8, 0, 8, 0, 32), Group(6, 8, 12, 32, 64), Group(5, 20, 5, 96, 32))
    assert groups[-1].first_row + groups[-1].rows == ROWS


def test_perm_is_the_inverse_of_invperm() -> None:
    matrix = load(exl2_tensors(LAYOUT, 32), ROWS, 32)
    assert torch.equal(matrix.perm[matrix.q_invperm.long()], torch.arange(ROWS))
    assert load(exl2_tensors(LAYOUT, 32, permuted=False), ROWS, 32).perm is None


def test_accounting() -> None:
    """formats/exl2.md 4.3, without the bias."""
    outputs = 64
    matrix = load(exl2_tensors(LAYOUT, outputs), ROWS, outputs)
    groups = len(LAYOUT)
    expected = sum(bits * rows * outputs for bits, rows in LAYOUT)
    expected += 16 * groups + 32 * groups + 4 * groups * outputs + 32 * ROWS
    assert matrix.storage_bits() == expected


def test_columns_are_a_valid_matrix_again() -> None:
    whole = load(exl2_tensors(LAYOUT, 95), ROWS, 95)
    for start, stop in ((0, 32), (8, 95), (3, 4), (31, 64), (0, 95)):
        part = whole.columns(start, stop)
        tensors = {
            "q_weight": part.q_weight,
            "q_scale": part.q_scale,
            "q_scale_max": part.q_scale_max,
            "q_invperm": part.q_invperm,
            "q_groups": torch.tensor([v for g in part.groups for v in (g.bits, g.first_word_row)]).to(torch.int16),
        }
        again = Exl2.load(tensors, part.shape, where="part")
        assert torch.equal(again.dequantize(), whole.dequantize()[:, start:stop])
        padded = Exl2.load(tensors, LinearShape(ROWS, part.q_weight.shape[1]), where="part").dequantize()
        assert not padded[:, stop - start :].any(), "padding columns are not zero"


def test_a_group_longer_than_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = load(exl2_tensors([(5, 256), (3, 192)], 40), 448, 40)
    whole = matrix.dequantize()
    monkeypatch.setattr("exl_runtime.formats.exl2.PIECE", 40 * 70)  # pieces of 64 rows
    assert torch.equal(matrix.dequantize(), whole)


def test_offsets_beyond_15_bits_are_unsigned() -> None:
    layout = [(8, 131072), (2, 32)]  # the second group starts at word row 32768
    tensors = exl2_tensors(layout, 1, permuted=False)
    assert tensors["q_groups"][3] < 0
    assert load(tensors, 131104, 1).groups[1].first_word_row == 32768


def test_weights_that_overflow_are_refused() -> None:
    tensors = exl2_tensors([(8, 32)], 32)
    tensors["q_scale_max"] = torch.tensor([60000.0]).half()
    with pytest.raises(NonFiniteError, match="q_scale_max"):
        load(tensors, 32, 32)


def test_large_and_negative_scales_are_legal() -> None:
    tensors = exl2_tensors([(2, 32)], 32)
    tensors["q_scale_max"] = torch.tensor([-20000.0]).half()
    weight = load(tensors, 32, 32).dequantize()
    assert weight.isfinite().all() and weight.abs().max() > 10000
