"""Cuts the work of a matrix product among the blocks of threads of a card. Numbers only, no tensors.

The units of all column groups of all matrices lie in one row, as long as their bytes; the row is cut in pieces of equal
bytes. The cuts depend on the matrices and on the card, never on the number of rows of the input or on timing, so that
results are reproducible (ext/cuda/skinny.h).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

TILE_COLUMN = 32
SEGMENT_WORDS = 8  # int32 numbers of one segment, struct Segment


@dataclass(frozen=True, slots=True)
class Cut:
    """Segments of all blocks, in order; block b works on segments[first[b] : first[b + 1]]."""

    segments: tuple[tuple[int, int, int, int, int, int, int, int], ...]
    first: tuple[int, ...]
    slots: int  # of partial sums


def cut(matrices: Sequence[tuple[int, Sequence[int]]], *, width: int, blocks: int, fewest: int, most_slots: int) -> Cut:
    """The plan for `blocks` blocks of threads that take `width` tile columns at a time.

    matrices    (outputs, lines before every unit and in all) of each
    fewest      units of a segment, except of a whole column group: shorter ones are not worth their start
    most_slots  partial sums that there is room for; fewer blocks are used where more would be needed
    """
    groups = sum(-(-outputs // (TILE_COLUMN * width)) for outputs, _ in matrices)
    while True:
        plans = [_cut(matrices, width, blocks, fewest)]
        if 0 < groups <= blocks and blocks % groups:  # as many pieces of every column group may be more even
            plans.append(_cut(matrices, width, blocks - blocks % groups, fewest))
        plans = [plan for plan in plans if plan.slots <= most_slots]
        if plans:
            return min(plans, key=lambda plan: largest_piece(plan, matrices))
        blocks = blocks * 3 // 4


def largest_piece(plan: Cut, matrices: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Lines of one tile column that the busiest block reads."""
    sizes = [matrices[number][1][end] - matrices[number][1][begin] for number, _, begin, end, *_ in plan.segments]
    return max((sum(sizes[a:b]) for a, b in pairwise(plan.first)), default=0)


def _cut(matrices: Sequence[tuple[int, Sequence[int]]], width: int, blocks: int, fewest: int) -> Cut:
    groups: list[tuple[int, int]] = []  # (matrix, tile column) of every column group
    starts = [0]  # lines before every column group
    for number, (outputs, lines) in enumerate(matrices):
        for column in range(0, -(-outputs // TILE_COLUMN), width):
            groups.append((number, column))
            starts.append(starts[-1] + max(lines[-1], 1))
    total = starts[-1]
    units = sum(len(matrices[number][1]) - 1 for number, _ in groups)
    blocks = max(1, min(blocks, -(-units // fewest) if units else 1))

    # A cut is (column group, unit), unit 0 standing for the boundary before the group.
    cuts = [(0, 0)]
    for block in range(1, blocks):
        place = total * block // blocks
        group = bisect_left(starts, place + 1) - 1
        lines = matrices[groups[group][0]][1]
        unit = bisect_left(lines, place - starts[group])
        if unit < fewest:
            unit = 0
        elif unit > len(lines) - 1 - fewest:
            group, unit = group + 1, 0
        last_group, last_unit = cuts[-1]
        if group > last_group or (group == last_group and unit >= last_unit + fewest):
            cuts.append((group, unit))
    end = (len(groups), 0)
    if cuts[-1] < end:
        cuts.append(end)

    inner: dict[int, list[int]] = {}  # cuts inside each column group
    for group, unit in cuts:
        if unit:
            inner.setdefault(group, []).append(unit)
    segments, first, slots = [], [0], 0
    slot_of: dict[int, int] = {}
    for (group, unit), (last_group, last_unit) in pairwise(cuts):
        for g in range(group, last_group + (1 if last_unit else 0)):
            number, column = groups[g]
            inside = inner.get(g, [])
            begin = unit if g == group else 0
            stop = last_unit if g == last_group else len(matrices[number][1]) - 1
            pieces = len(inside) + 1
            if pieces > 1 and g not in slot_of:
                slot_of[g] = slots
                slots += pieces
            piece = inside.index(begin) + 1 if begin else 0
            segments.append((number, column, begin, stop, piece, pieces, slot_of.get(g, 0), 0))
        first.append(len(segments))
    return Cut(tuple(segments), tuple(first), slots)
