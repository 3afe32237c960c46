"""The option tables against the sizes that the format's description prints, and how rows are cut into groups."""

import pytest

from convert.encoded import check_layout, stored_bits
from convert.layouts import (
    CLASSIC_ATTENTION,
    CLASSIC_MLP,
    HEAD,
    HEAD_BITS,
    Option,
    describe,
    grouped,
    head_option,
    option,
)
from exl_runtime.errors import ConvertError

# formats/exl2.md 6.1, last columns. They count everything: codes, scales, maxima, group table, permutation.
ATTENTION_BPW = (
    *("2.133", "2.215", "2.426", "2.672", "3.164", "3.168", "4.039", "4.047", "4.086", "4.133"),
    *("4.168", "4.194", "4.403", "4.459", "5.383", "5.459", "6.039", "6.633", "8.039"),
)
MLP_BPW = (
    *("2.248", "2.326", "2.597", "2.913", "3.285", "3.368", "3.620", "4.139", "4.200", "4.267"),
    *("4.351", "5.250", "5.333", "6.072", "6.303", "6.869", "8.036"),
)
HEAD_BPW = {2: "2.74", 3: "3.28", 4: "4.44", 5: "5.19", 6: "6.34", 8: "8.03"}  # at 4096 x 32000


def all_options() -> list[Option]:
    rows = (*CLASSIC_ATTENTION, *CLASSIC_MLP)
    return list(dict.fromkeys([one for row in rows for one in row.values()] + list(HEAD.values())))


@pytest.mark.parametrize(
    ("table", "printed", "shapes"),
    [
        (CLASSIC_ATTENTION, ATTENTION_BPW, dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096))),
        (
            CLASSIC_MLP,
            MLP_BPW,
            {"gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096)},
        ),
    ],
    ids=["attention", "mlp"],
)
def test_tables_have_the_printed_sizes(table, printed, shapes) -> None:
    weights = sum(k * n for k, n in shapes.values())
    sizes = []
    for row in table:
        assert row.keys() == shapes.keys()
        sizes.append(sum(stored_bits(row[key].layout(k), k, n) for key, (k, n) in shapes.items()) / weights)
    assert tuple(f"{size:.3f}" for size in sizes) == printed


def test_heads_have_the_printed_sizes() -> None:
    assert tuple(HEAD_BPW) == HEAD_BITS
    for bits, printed in HEAD_BPW.items():
        assert f"{stored_bits(head_option(bits).layout(4096), 4096, 32000) / 4096 / 32000:.2f}" == printed


@pytest.mark.parametrize("bits", [0, 1, 7, 16])
def test_unknown_head_settings_are_refused(bits: int) -> None:
    with pytest.raises(ConvertError, match=f"--head-bits {bits}") as caught:
        head_option(bits)
    assert "(2, 3, 4, 5, 6, 8)" in str(caught.value)


def slow_layout(one: Option, inputs: int) -> tuple[tuple[int, int], ...]:
    """formats/exl2.md 6.1, row by row: which width and group each row falls into."""
    left, rows = inputs, []
    for bits, share, size in zip(one.bits, one.shares, one.group_sizes, strict=True):
        groups = -int(-min(inputs * share, left) // size)
        rows += [(bits, group) for group in range(groups) for _ in range(size)]
        left -= groups * size
    runs: list[list] = []
    for row in rows[:inputs]:
        if runs and runs[-1][0] == row:
            runs[-1][1] += 1
        else:
            runs.append([row, 1])
    return tuple((row[0], count) for row, count in runs)


@pytest.mark.parametrize("inputs", [32, 64, 96, 128, 160, 352, 704, 768, 896, 1376, 4096, 11008])
def test_every_option_is_a_legal_layout_of_every_height(inputs: int) -> None:
    for one in all_options():
        layout = one.layout(inputs)
        check_layout(layout, inputs)
        assert layout == slow_layout(one, inputs)
        for bits, size in zip(one.bits, one.group_sizes, strict=True):  # only the last group of all may be shorter
            assert all(rows == size for width, rows in layout[:-1] if width == bits)
            assert layout[-1][0] != bits or layout[-1][1] <= size


def test_groups_by_hand() -> None:
    """704 rows, a tenth of them in 4 bits: 70.4 rows are one group of 128; 576 rows are left: four groups and 64."""
    assert option("4/3", ".1").layout(704) == ((4, 128), (3, 128), (3, 128), (3, 128), (3, 128), (3, 64))
    # 352 rows: .05 is 17.6 rows, one group of 32; .2 is 70.4, two groups of 64; 192 rows of 2 bits
    assert option("6/3/2", ".05/.2", "32/64/64").layout(352) == ((6, 32), (3, 64), (3, 64), (2, 64), (2, 64), (2, 64))
    assert option("8/6", ".15").layout(64) == ((8, 64),)  # the first group takes all there is
    assert option("4").layout(32) == ((4, 32),)


def test_how_options_are_written() -> None:
    assert option("4/3", ".25", "64") == Option((4, 3), (0.25, 0.75), (64, 64))
    assert option("8") == Option((8,), (1.0,), (128,))
    three = option("8/4/3", ".05/.1", "32/128/128")
    assert three.bits == (8, 4, 3) and three.group_sizes == (32, 128, 128)
    assert three.shares == pytest.approx((0.05, 0.1, 0.85))


def test_runs_are_cut_into_groups() -> None:
    assert grouped([(5, 64), (4, 160), (2, 32)], 64) == ((5, 64), (4, 64), (4, 64), (4, 32), (2, 32))
    assert grouped([(3, 0), (2, 96)], 128) == ((2, 96),)
    check_layout(grouped([(8, 96), (3, 352)], 128), 448)


def test_descriptions() -> None:
    assert describe(((5, 64), (5, 32), (4, 128), (4, 128))) == "0.273:5b_64g/0.727:4b_128g"
    assert describe(((4, 96),)) == "1:4b_96g"
    assert describe(option("8/4/3", ".05/.1", "32/128/128").layout(4096)) == "0.0547:8b_32g/0.125:4b_128g/0.82:3b_128g"
