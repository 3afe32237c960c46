"""Products of 33 to 256 rows on the tiles, and of more by the library: the format's own weights, sums in float32."""

from typing import Any

import pytest
import torch
from cuda_matrices import EVERY_WIDTH, MATRICES, assert_sums, exl2, gptq, halves, packed, random
from oracles import same_bits

from exl_runtime.ops.linear import workspace_cuda

Card = Any


@pytest.mark.parametrize("name", MATRICES)
def test_sums(card: Card, name: str) -> None:
    w = MATRICES[name]()
    kernel, weight = packed(w, card.device), w.dequantize().double()
    x = halves(67, weight.shape[0])
    y = kernel.float32(*card.on(x))
    assert_sums(y, x, weight)
    assert same_bits(kernel(*card.on(x)), y.half())


@pytest.mark.parametrize("rows", [33, 64, 65, 128, 200, 256])
def test_row_blocks(card: Card, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_cuda, "FEWEST_UNITS", 2)
    w = exl2(EVERY_WIDTH, 160)
    kernel = packed(w, card.device)
    x = halves(rows, 320)
    assert_sums(kernel.float32(*card.on(x)), x, w.dequantize().double())
    assert not workspace_cuda.workspace(card.device).tickets.any()


def test_a_row_does_not_depend_on_the_others(card: Card) -> None:
    kernel = packed(gptq(4, 640, 96, 40, act_order=True), card.device)
    (x,) = card.on(halves(150, 640))
    whole, few = kernel.float32(x), kernel.float32(x[:50])
    assert same_bits(kernel.float32(x[3:143])[60:], whole[63:143])
    assert same_bits(kernel.float32(x[10:50])[5:], few[15:50])


def test_the_order_of_threads_does_not_matter(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_cuda, "FEWEST_UNITS", 2)
    kernel = packed(exl2([(5, 512), (3, 160)], 130), card.device)
    (x,) = card.on(halves(70, 672))
    card.every_order(lambda: kernel.float32(x), seeds=2)
    (x,) = card.on(halves(34, 672))
    card.every_order(lambda: kernel.float32(x), seeds=2)


@pytest.mark.parametrize("rows", [40, 300])
def test_inputs_of_other_types(card: Card, rows: int) -> None:
    w = exl2(EVERY_WIDTH, 64)
    kernel = packed(w, card.device)
    x = random(rows, 320) * torch.logspace(-20, 20, rows)[:, None]
    y = kernel(*card.on(x))
    assert_sums(y, x, w.dequantize().double(), inputs=2.0**-10)  # 2^-11, and numbers far below a row's largest
    x[7] = 0
    x[9, 3] = float("nan")
    z = kernel(*card.on(x))
    assert not z[7].any() and z[9].isnan().all()
    assert same_bits(z[10:], y[10:])


@pytest.mark.parametrize("name", ["exl2 every width", "gptq 3 bit, odd groups", "gptq 4 bit, rows not whole units"])
def test_many_rows_by_the_library(card: Card, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = MATRICES[name]()
    kernel = packed(w, card.device)
    x = halves(260, w.shape.in_features)
    y = kernel.float32(*card.on(x))
    assert_sums(y, x, w.dequantize().double())
    assert same_bits(kernel(*card.on(x)), y.half())
    space = workspace_cuda.workspace(card.device)
    monkeypatch.setattr(space, "panel", space.panel[: w.shape.in_features * 32])  # one tile column at a time
    assert_sums(kernel.float32(*card.on(x)), x, w.dequantize().double())


def test_many_rows_are_added_to_a_stream(card: Card) -> None:
    kernel = packed(exl2(EVERY_WIDTH, 72), card.device)
    for rows in (40, 300):
        x, stream = card.on(halves(rows, 320), random(rows, 72, seed=1))
        expected = stream + kernel.float32(x)
        assert kernel.add_to(stream, x) is stream
        assert same_bits(stream, expected)
