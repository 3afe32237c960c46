"""GPTQ: bit streams by hand, groups, every reading of zero-points."""

import pytest
import torch
from matrices import gptq_tensors

from exl_runtime.errors import FormatError, NonFiniteError
from exl_runtime.formats.base import LinearShape
from exl_runtime.formats.bits import pack_columns, pack_rows, unpack_columns, unpack_rows
from exl_runtime.formats.gptq import Gptq, read_zeros
from exl_runtime.formats.hints import GptqHints

V2 = GptqHints(layout="gptq_v2", sym=False)
Tensors = dict[str, torch.Tensor]


def load(tensors: Tensors, inputs: int, outputs: int, hints: GptqHints = V2) -> Gptq:
    return Gptq.load(tensors, LinearShape(inputs, outputs), where="m", hints=hints)


def by_hand(tensors: Tensors, bits: int, row_group: torch.Tensor) -> torch.Tensor:
    codes = unpack_rows(tensors["qweight"], bits).double()
    zeros = unpack_columns(tensors["qzeros"], bits, codes.shape[1]).double()
    # The product of a small integer and a half is exact in float64.
    return ((codes - zeros[row_group]) * tensors["scales"].double()[row_group]).half().float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("inputs", "group_size"), [(64, 32), (96, -1), (160, 96), (192, 48), (128, 50)])
@pytest.mark.parametrize("act_order", [False, True])
def test_any_group_size(bits: int, inputs: int, group_size: int, act_order: bool) -> None:
    outputs = 40
    tensors = gptq_tensors(bits, inputs, outputs, group_size, act_order=act_order)
    row_group = tensors["g_idx"].long()
    expected = by_hand(tensors, bits, row_group)
    hints = GptqHints(layout="gptq_v2", sym=False, group_size=group_size)
    matrix = load(tensors, inputs, outputs, hints)
    assert matrix.bits == bits
    assert torch.equal(matrix.dequantize(), expected)
    consecutive = inputs if group_size == -1 else group_size
    assert matrix.group_size == (None if act_order and group_size != -1 else consecutive)
    if not act_order:
        for missing in ({}, {"g_idx": torch.zeros(inputs, dtype=torch.int32)}):
            bare = {name: tensor for name, tensor in tensors.items() if name != "g_idx"} | missing
            assert torch.equal(load(bare, inputs, outputs, hints).dequantize(), expected)


def test_group_size_without_a_declaration() -> None:
    for inputs, group_size, found in ((256, 64, 64), (192, 48, 48), (160, 128, 128)):
        tensors = gptq_tensors(4, inputs, 8, group_size)
        del tensors["g_idx"]
        assert load(tensors, inputs, 8).group_size == found
    tensors = gptq_tensors(4, 104, 8, 50)  # 3 groups: 104 / 3 is no integer, 64 gives 2 groups
    del tensors["g_idx"]
    with pytest.raises(FormatError, match="fit no group size"):
        load(tensors, 104, 8)
    assert load(tensors, 104, 8, GptqHints(layout="gptq_v2", group_size=50)).group_size == 50


def test_the_tensors_overrule_a_wrong_group_size() -> None:
    tensors = gptq_tensors(4, 256, 8, 64)
    expected = by_hand(tensors, 4, tensors["g_idx"].long())
    del tensors["g_idx"]
    assert torch.equal(load(tensors, 256, 8, GptqHints(layout="gptq_v2", group_size=128)).dequantize(), expected)


def test_negative_group_indices_count_from_the_end() -> None:
    tensors = gptq_tensors(4, 128, 16, 32, act_order=True)
    expected = load(tensors, 128, 16).dequantize()
    tensors["g_idx"] = torch.where(tensors["g_idx"] > 1, tensors["g_idx"] - 4, tensors["g_idx"])
    assert (tensors["g_idx"] < 0).any()
    assert torch.equal(load(tensors, 128, 16).dequantize(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wide_scales_are_rounded_to_half_first(dtype: torch.dtype) -> None:
    tensors = gptq_tensors(4, 64, 16, 32)
    wide = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)).mul(0.01).to(dtype)
    expected = by_hand({**tensors, "scales": wide.half()}, 4, tensors["g_idx"].long())
    matrix = load({**tensors, "scales": wide}, 64, 16)
    assert torch.equal(matrix.dequantize(), expected)
    stored = 32 * (tensors["qweight"].numel() + tensors["qzeros"].numel() + 64) + 8 * wide.element_size() * 32
    assert matrix.storage_bits() == stored


# --- zero-points --------------------------------------------------------------------------------------------------


def zeros_of(stored: list[int], bits: int, hints: GptqHints) -> list[int]:
    return read_zeros(pack_columns(torch.tensor([stored]), bits), bits, len(stored), hints)[0].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v2_is_stored_and_v1_is_one_less(bits: int) -> None:
    stored = [i % ((1 << bits) - 1) for i in range(64)]  # no all-ones field: the readings agree
    assert zeros_of(stored, bits, GptqHints(layout="gptq_v2")) == stored
    for hints in (GptqHints(), GptqHints(carry=True), GptqHints(sym=False)):
        assert zeros_of(stored, bits, hints) == [zero + 1 for zero in stored]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_word_reading_undoes_a_word_wide_subtraction(bits: int) -> None:
    """Zero-points 0 borrow from their neighbour; only the carry brings both back."""
    wanted = torch.randint(0, 1 << bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    wanted[0, ::3] = 0
    words = pack_columns(wanted, bits).long() & 0xFFFFFFFF
    ones = sum(1 << shift for shift in range(0, 32, bits))
    written = (words - ones) & 0xFFFFFFFF
    written = torch.where(written >> 31 == 1, written - (1 << 32), written).to(torch.int32)
    for hints in (GptqHints(carry=True), GptqHints(sym=False)):
        assert torch.equal(read_zeros(written, bits, 64, hints).long(), wanted)
    assert not torch.equal(read_zeros(written, bits, 64, GptqHints()).long(), wanted)


def test_three_bit_wraps() -> None:
    assert zeros_of([7, 0, 6] * 32, 3, GptqHints(carry=True)) == [0, 1, 7] * 32
    assert zeros_of([7, 0, 6] * 32, 3, GptqHints()) == [8, 1, 7] * 32


def test_field_reading_has_a_zero_point_of_16() -> None:
    assert zeros_of([15, 0, 7, 7] * 8, 4, GptqHints(sym=True)) == [16, 1, 8, 8] * 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_symmetric_files_are_read_right_under_either_label(bits: int, layout: str) -> None:
    middle = 1 << (bits - 1)
    for sym in (True, None):
        hints = GptqHints(layout=layout, sym=sym)
        assert zeros_of([middle] * 32, bits, hints) == [middle] * 32
        assert zeros_of([middle - 1] * 32, bits, hints) == [middle] * 32
    asymmetric = GptqHints(layout=layout, sym=False)
    assert zeros_of([middle] * 32, bits, asymmetric) == [middle + (layout == "gptq")] * 32


def test_planar_three_bit() -> None:
    tensors = gptq_tensors(3, 64, 32, 32)
    expected = load(tensors, 64, 32).dequantize()

    def planar(words: torch.Tensor) -> torch.Tensor:
        codes = unpack_rows(words, 3).long()
        low, high = pack_rows(codes & 3, 2), pack_rows(codes >> 2, 1)
        blocks = [torch.cat([low[2 * b : 2 * b + 2], high[b : b + 1]]) for b in range(codes.shape[0] // 32)]
        return torch.cat(blocks)

    tensors["qweight"] = planar(tensors["qweight"])
    tensors["qzeros"] = planar(tensors["qzeros"].t().contiguous()).t().contiguous()
    assert torch.equal(load(tensors, 64, 32, GptqHints(layout="gptq_p")).dequantize(), expected)


# --- the rest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_columns_at_any_bounds(bits: int) -> None:
    matrix = load(gptq_tensors(bits, 96, 70, 32, act_order=True), 96, 70)
    whole = matrix.dequantize()
    for start, stop in ((0, 70), (1, 2), (7, 70), (32, 64)):
        part = matrix.columns(start, stop)
        assert torch.equal(part.dequantize(), whole[:, start:stop])
        columns = stop - start
        words = 96 * bits // 32 * columns + 3 * -(-columns * bits // 32)
        assert part.storage_bits() == 32 * words + 16 * 3 * columns + 32 * 96


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = load(gptq_tensors(3, 256, 33, 48, act_order=True), 256, 33)
    whole = matrix.dequantize()
    monkeypatch.setattr("exl_runtime.formats.gptq.PIECE", 33 * 70)
    assert torch.equal(matrix.dequantize(), whole)


def test_weights_that_overflow_are_refused() -> None:
    tensors = gptq_tensors(8, 32, 8, -1)
    tensors["scales"][0, 3] = 40000.0
    with pytest.raises(NonFiniteError, match="scales"):
        load(tensors, 32, 8)


def test_shape_is_inferred_or_refused() -> None:
    tensors = gptq_tensors(3, 96, 40, 32)
    assert Gptq.infer_shape(tensors, where="m") == LinearShape(96, 40)
    del tensors["g_idx"]
    assert Gptq.infer_shape(tensors, where="m") == LinearShape(96, 40)
    narrow = gptq_tensors(4, 96, 2, 32)
    del narrow["g_idx"]
    with pytest.raises(FormatError, match="fits 2 or 3 or 4 or 8 bits"):
        Gptq.infer_shape(narrow, where="m")
