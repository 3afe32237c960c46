"""Any matrix, packed and read back from the drawing of the layout alone; and its product within the stated bound."""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed_layout import SPAN_UNITS, UNIT, read_packed
from quantize import words_of

from exl_runtime.ops import native
from exl_runtime.ops.linear.tiles import Residual, Run, Source, pack

pytestmark = pytest.mark.usefixtures("kernels")


@dataclass
class Expected:
    """A random matrix as plain numbers. codes, scales, zeros: (inputs, outputs); order: the input at each position."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    order: np.ndarray
    runs: list[Run] = field(default_factory=list)

    def weights(self) -> np.ndarray:
        return (self.codes - self.zeros) * self.scales


def padded_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """The streams of columns, filled up to whole words."""
    fill = next(n for n in range(33) if (len(codes) + n) * bits % 32 == 0)
    return words_of(np.concatenate([codes, np.zeros((fill, codes.shape[1]), codes.dtype)]), bits)


def exl2(layout: list[tuple[int, int]], outputs: int, permuted: bool, seed: int) -> tuple[Source, Expected]:
    """layout: (bits, units) of every group."""
    rng = np.random.default_rng(seed)
    inputs, stride = sum(units for _, units in layout) * UNIT, -(-outputs // 32) * 32
    stored, words = np.zeros((inputs, stride), int), []
    scales, zeros = np.zeros((inputs, outputs)), np.zeros((inputs, outputs), int)
    tables = (rng.integers(0, 1000, (len(layout), 16)) * np.exp2(-24.0 + rng.integers(0, 12))).astype(np.float16)
    nibbles = rng.integers(0, 16, (len(layout), stride))
    row = 0
    for g, (bits, units) in enumerate(layout):
        here = slice(row, row + units * UNIT)
        stored[here] = rng.integers(0, 1 << bits, (units * UNIT, stride))
        words.append(words_of(stored[here], bits))
        scales[here], zeros[here] = tables[g][nibbles[g, :outputs]], 1 << (bits - 1)
        row = here.stop
    order = rng.permutation(inputs) if permuted else np.arange(inputs)
    back = np.argsort(order)
    expected = Expected(
        stored[back][:, :outputs], scales[back], zeros[back], order, [Run(bits, units * UNIT) for bits, units in layout]
    )
    source = Source(
        inputs=inputs,
        outputs=outputs,
        runs=expected.runs,
        words=torch.from_numpy(np.concatenate(words)),
        order=None,
        rows=torch.from_numpy(order.astype(np.int32)) if permuted else None,
        scales=torch.from_numpy(np.stack([words_of(line[:, None], 4)[:, 0] for line in nibbles])),
        tables=torch.from_numpy(tables.astype(np.float32)),
    )
    return source, expected


def gptq(
    bits: int, inputs: int, outputs: int, group_size: int, act_order: bool, symmetric: bool, seed: int
) -> tuple[Source, Expected]:
    """Groups of any size and rows of any number; act_order scatters the rows of the groups."""
    rng = np.random.default_rng(seed)
    groups = -(-inputs // group_size)
    group = np.arange(inputs) // group_size
    if act_order:
        group = rng.permutation(group)
    codes = rng.integers(0, 1 << bits, (inputs, outputs))
    scales = (rng.integers(0, 2048, (groups, outputs)) * np.exp2(-24.0 + rng.integers(0, 12))).astype(np.float16)
    base = 1 << (bits - 1) if symmetric else int(rng.integers(0, 2))
    zeros = np.zeros((groups, outputs), int) if symmetric else rng.integers(0, 1 << bits, (groups, outputs))
    pieces = [np.flatnonzero(group == g) for g in range(groups)]
    order = np.concatenate([np.pad(rows, (0, -len(rows) % UNIT), constant_values=-1) for rows in pieces])
    runs = [Run(bits, -(-len(rows) // UNIT) * UNIT) for rows in pieces]
    in_order = np.array_equal(order, np.arange(inputs))
    as_tensor = None if in_order else torch.from_numpy(order.astype(np.int32))
    source = Source(
        inputs=inputs,
        outputs=outputs,
        runs=runs,
        words=torch.from_numpy(padded_words(codes, bits)),
        order=as_tensor,
        rows=as_tensor,
        scales=torch.from_numpy(scales),
        zeros=None if symmetric else torch.from_numpy(zeros.astype(np.uint8)),
        zero_base=base,
    )
    return source, Expected(codes, scales[group].astype(float), (zeros + base)[group], order, runs)


def check(source: Source, expected: Expected, seed: int) -> None:
    packed = pack(source)
    read = read_packed(packed)
    assert (read.inputs, read.outputs) == expected.codes.shape
    assert np.array_equal(read.rows, expected.order)
    live = read.rows >= 0
    rows = read.rows[live]
    for name in ("codes", "scales", "zeros"):
        assert np.array_equal(getattr(read, name)[live], getattr(expected, name)[rows]), name
    assert [(bits, group) for bits, group, _ in read.spans] == [
        (run.bits, g) for g, run in enumerate(expected.runs) for _ in range(0, run.positions // UNIT, SPAN_UNITS)
    ]
    check_product(packed, read.spans, expected, seed)


def check_product(packed: torch.Tensor, spans: list[tuple[int, int, int]], expected: Expected, seed: int) -> None:
    """ext/cpu/linear_packed.h: an input is off by at most its span's largest / 254, or / 32512 with the residual.

    Beside that, float32 rounds three times a span and once for every span added.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, len(expected.codes))).astype(np.float32)
    x[1] *= np.exp(3 * rng.standard_normal(x.shape[1]))
    weights = expected.weights()
    wanted = x.astype(float) @ weights
    for residual, step in ((Residual.ALWAYS, 32512), (Residual.NEVER, 254)):
        error, position = np.zeros(x.shape), 0
        for _, _, units in spans:
            rows = expected.order[position : position + units * UNIT]
            rows = rows[rows >= 0]
            position += units * UNIT
            if len(rows):
                error[:, rows] = np.abs(x[:, rows]).max(1, keepdims=True) / step
        rounding = (len(spans) + 4) * 2.0**-24 * ((np.abs(x) + error) @ np.abs(weights))
        for got in on_every_instruction_set(torch.from_numpy(x), packed, residual):
            assert (np.abs(got.numpy() - wanted) <= error @ np.abs(weights) + rounding + 1e-44).all()


def on_every_instruction_set(x: torch.Tensor, packed: torch.Tensor, residual: int) -> list[torch.Tensor]:
    """The product by every kernel this CPU can run."""
    results = []
    try:
        for name in ("portable", "avx2", "avx512"):
            with contextlib.suppress(RuntimeError):  # not on this CPU
                native.ops().set_isa(name)
                results.append(native.ops().linear_packed(x, packed, int(residual)))
    finally:
        native.ops().set_isa("best")
    assert results
    return results


@settings(max_examples=40, deadline=None)
@given(
    layout=st.lists(st.tuples(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 9)), min_size=1, max_size=12),
    outputs=st.integers(1, 50),
    permuted=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
@example(layout=[(4, 66), (3, 70), (2, 1)], outputs=17, permuted=True, seed=1)  # several panels
def test_any_mixture_of_exl2_widths(layout: list[tuple[int, int]], outputs: int, permuted: bool, seed: int) -> None:
    """In any order of widths, although files have them falling."""
    check(*exl2(layout, outputs, permuted, seed), seed)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 50),
    group_size=st.integers(1, 300),
    act_order=st.booleans(),
    symmetric=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
@example(bits=3, inputs=2300, outputs=33, group_size=2300, act_order=False, symmetric=False, seed=1)
@example(bits=4, inputs=2100, outputs=5, group_size=96, act_order=True, symmetric=True, seed=1)
def test_any_gptq_matrix(
    bits: int, inputs: int, outputs: int, group_size: int, act_order: bool, symmetric: bool, seed: int
) -> None:
    """Odd numbers of rows and columns, groups of one row, rows scattered over the groups."""
    check(*gptq(bits, inputs, outputs, group_size, act_order, symmetric, seed), seed)


def test_the_reading_can_fail() -> None:
    """One bit of a code, of a scale or of the order, and the comparison above notices."""
    source, expected = exl2([(5, 2), (3, 1)], 32, True, 3)
    packed = pack(source)
    rows_at, tiles_at = (int.from_bytes(packed[i : i + 8].numpy().tobytes(), "little") for i in (96, 112))
    for place in (-1, tiles_at, rows_at + 8):
        broken = packed.clone()
        broken[place] ^= 1
        read = read_packed(broken)
        live = read.rows
        same = [np.array_equal(getattr(read, n), getattr(expected, n)[live]) for n in ("codes", "scales", "zeros")]
        assert not (all(same) and np.array_equal(read.rows, expected.order))
