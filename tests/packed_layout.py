"""A slow reading of packed matrices, written from the drawing in ext/cpu/tiles.h and from nothing else."""

import struct
from dataclasses import dataclass

import numpy as np
from torch import Tensor

UNIT, SPAN_UNITS = 32, 4
SHAPES = {"2": (32, 32)}  # by version: the columns of a tile, the most units of a panel
EXL2, SYMMETRIC, ZEROS = range(3)
TOGETHER = {EXL2: 8, SYMMETRIC: 2, ZEROS: 4}  # groups whose scales lie together
SCALE_BYTES = {EXL2: 4, SYMMETRIC: 4, ZEROS: 12}  # for each column

# Line after line of a unit: what lies in a byte, lowest bit first. "3.45": bits 4 and 5 of the codes in quad 3.
LINES = {
    8: ("0", "1", "2", "3", "4", "5", "6", "7"),
    4: ("0 1", "2 3", "4 5", "6 7"),
    2: ("0 1 2 3", "4 5 6 7"),
    6: ("0 3.01", "1 3.23", "2 3.45", "4 7.01", "5 7.23", "6 7.45"),
    5: ("0 5.012", "1 5.34 7.3", "2 6.012", "3 6.34 7.4", "4 7.012"),
    3: ("0 1 6.01", "2 3 7.01", "4 5 6.2 7.2"),
}


@dataclass(frozen=True, slots=True)
class Read:
    """What a packed matrix says. `codes`, `scales`, `zeros`: (positions, outputs); `rows` (positions,), -1: no input.

    spans  bits, group and units of each
    """

    inputs: int
    outputs: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    rows: np.ndarray
    spans: list[tuple[int, int, int]]

    def weights(self) -> np.ndarray:
        """float64 (inputs, outputs)."""
        out = np.zeros((self.inputs, self.outputs))
        live = self.rows >= 0
        out[self.rows[live]] = ((self.codes - self.zeros) * self.scales)[live]
        return out


def read_packed(packed: Tensor) -> Read:
    """Every byte of the tiles is read once; whatever does not add up fails an assertion."""
    memory = packed.numpy().tobytes()
    names = "magic signature inputs outputs positions groups spans panels kind zero_base spans_at panels_at rows_at"
    head = dict(
        zip([*names.split(), "tables_at", "tiles_at", "bytes"], struct.unpack_from("<QQ14q", memory), strict=True)
    )
    magic = head["magic"].to_bytes(8, "little").decode()
    assert magic[:7] == "elxtile" and head["bytes"] == len(memory)
    wide, most_units = SHAPES[magic[7]]
    kind, outputs, positions = head["kind"], head["outputs"], head["positions"]
    spans = [struct.unpack_from("<4i", memory, head["spans_at"] + 16 * i) for i in range(head["spans"])]
    panels = [struct.unpack_from("<5q", memory, head["panels_at"] + 40 * i) for i in range(head["panels"])]
    tables = np.frombuffer(memory, "<f4", 16 * head["groups"] if kind == EXL2 else 0, head["tables_at"]).reshape(-1, 16)
    rows = np.frombuffer(memory, "<i4", positions, head["rows_at"]) if head["rows_at"] else np.arange(positions)
    tiles = -(-outputs // wide)
    shape = (positions, tiles * wide)
    codes, scales, zeros = np.zeros(shape, int), np.zeros(shape), np.zeros(shape, int)
    read, first = 0, 0
    for span, count, unit, start, tile_bytes in panels:
        assert (span, unit) == (first, sum(s[2] for s in spans[:first])) and start == head["tiles_at"] + read
        first += count
        for tile in range(tiles):
            place = start + tile * tile_bytes
            at, columns, known = place, slice(tile * wide, (tile + 1) * wide), None
            position = unit * UNIT
            for number, (bits, group, units, scale_bytes) in enumerate(spans[span : span + count]):
                if scale_bytes:
                    assert scale_bytes == SCALE_BYTES[kind] * wide
                    known, block = group // TOGETHER[kind], memory[at : at + scale_bytes]
                    at += scale_bytes
                else:
                    assert number > 0 and known == group // TOGETHER[kind]
                here = slice(position, position + units * UNIT)
                scales[here, columns], zeros[here, columns] = scales_of(
                    block, kind, group, tables, 1 << (bits - 1), head["zero_base"], wide
                )
                for _ in range(units):
                    codes[position : position + UNIT, columns] = unit_codes(
                        memory[at : at + bits * 4 * wide], bits, wide
                    )
                    position += UNIT
                    at += bits * 4 * wide
            assert at == place + tile_bytes
            read += tile_bytes
    assert first == len(spans) and head["tiles_at"] + read == len(memory)
    units_of = [sum(s[2] for s in spans[p[0] : p[0] + p[1]]) for p in panels]
    assert all(units <= SPAN_UNITS for _, _, units, _ in spans) and max(units_of) <= most_units
    return Read(
        head["inputs"],
        outputs,
        codes[:, :outputs],
        scales[:, :outputs],
        zeros[:, :outputs],
        rows,
        [(bits, group, units) for bits, group, units, _ in spans],
    )


def unit_codes(lines: bytes, bits: int, wide: int) -> np.ndarray:
    """(32, wide): the codes of a unit, position by column."""
    codes = np.zeros((UNIT, wide), dtype=int)
    for line, drawing in enumerate(LINES[bits]):
        block = np.frombuffer(lines, np.uint8, 4 * wide, line * 4 * wide).reshape(wide, 4).astype(int)  # column, j
        low = 0
        for field in drawing.split():
            quad, _, digits = field.partition(".")
            for bit in map(int, digits) if digits else range(bits):
                codes[4 * int(quad) : 4 * int(quad) + 4] |= (block.T >> low & 1) << bit
                low += 1
        assert low <= 8
    return codes


def scales_of(
    block: bytes, kind: int, group: int, tables: np.ndarray, middle: int, zero_base: int, wide: int
) -> tuple[np.ndarray, np.ndarray]:
    """The scales and the zero-points of a tile's columns."""
    slot = group % TOGETHER[kind]
    if kind == EXL2:
        pairs = np.frombuffer(block, np.uint8, wide // 2, slot * wide // 2)
        nibbles = np.stack([pairs & 15, pairs >> 4], axis=1).flatten()
        column = [16 * half + c for half in range(wide // 16) for c in (*range(0, 16, 2), *range(1, 16, 2))]
        scales = np.empty(wide)
        scales[column] = tables[group][nibbles]
        return scales, np.full(wide, middle)
    scales = np.frombuffer(block, "<f2", wide, slot * 2 * wide).astype(float)
    if kind == SYMMETRIC:
        return scales, np.full(wide, middle)
    return scales, np.frombuffer(block, np.uint8, wide, (4 * 2 + slot) * wide).astype(int) + zero_base
