"""Tables: alignment by places of a terminal, nothing lost when they are narrow, nothing alive in HTML."""

from html.parser import HTMLParser

import pytest
from rich.cells import cell_len

from eval.tables import Table, escape, left, number, right

SAMPLE = Table([left("model"), right("KL"), left("format")], [("a", "0.125", "exl2"), ("longer", "12.5", "")])


def test_columns_are_aligned() -> None:
    assert SAMPLE.text(0) == (
        "model      KL  format\n"
        "─────────────────────\n"
        "a       0.125  exl2\n"
        "longer   12.5"
    )  # fmt: skip


def test_caption_stands_above() -> None:
    table = Table([left("a")], [("1",)], caption="what this is")
    assert table.text(0).splitlines()[0] == "what this is"
    assert "<caption>what this is</caption>" in table.html()


def test_wide_and_combining_characters_keep_the_columns() -> None:
    names = ("模型模型", "cafe\u0301", "plain", "\uff57\uff49\uff44\uff45")
    table = Table([left("name"), right("n"), left("x")], [(name, str(i), "|") for i, name in enumerate(names)])
    lines = table.text(0).splitlines()[2:]
    assert {cell_len(line) for line in lines} == {cell_len(lines[0])}
    assert all(line.endswith(f"{i}  |") for i, line in enumerate(lines))


def test_control_characters_cannot_steer_the_terminal() -> None:
    text = Table([left("name")], [("a\x1b[31mred\r\nnext\u202e",)]).text(0)
    assert text.splitlines()[2] == "a\\x1b[31mred\\x0d\\x0anext\\u202e"


def test_a_narrow_terminal_gets_blocks_with_all_numbers() -> None:
    numbers = [[f"{row}{column}.{'5' * 6}" for column in range(8)] for row in range(3)]
    rows = [(f"a-rather-long-name-of-a-model-{row}", *cells) for row, cells in enumerate(numbers)]
    table = Table([left("model"), *(right(f"c{i}") for i in range(8))], rows)
    text = table.text(50)
    assert all(cell_len(line) <= 50 for line in text.splitlines())
    assert all(cell in text for cells in numbers for cell in cells)
    blocks = text.split("\n\n")
    assert len(blocks) > 1
    for block in blocks:
        shown = [line.split()[0] for line in block.splitlines()]
        assert shown[0] == "model"
        assert [name[-1] for name in shown[2:]] == ["0", "1", "2"], "names keep their ends"
        assert all(name.startswith("a-ra") and "…" in name for name in shown[2:])


def test_a_log_gets_every_character() -> None:
    name = "x" * 300
    assert name in Table([left("model"), right("n")], [(name, "1")]).text(0)


def test_a_row_of_another_length_is_a_bug() -> None:
    with pytest.raises(ValueError, match="2 cells for 3 columns"):
        SAMPLE.add("a", "b")


def test_html_holds_the_cells_and_nothing_else() -> None:
    evil = '<img src=x onerror="alert(1)"> & \x00'
    table = Table([left("m<b>"), right("n")], [(evil, "1"), ("", "-")])

    class Reader(HTMLParser):
        cells: list[str] = []  # noqa: RUF012
        tags: set[str] = set()  # noqa: RUF012
        classes: list[tuple[str, str | None]] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            self.classes += [(tag, dict(attrs).get("class")) for _ in [0] if tag in ("th", "td")]
            if tag in ("th", "td"):
                self.cells.append("")

        def handle_data(self, data: str) -> None:
            if data.strip():
                self.cells[-1] += data

    reader = Reader()
    reader.feed(table.html())
    assert reader.cells == ["m<b>", "n", evil.replace("\x00", "\\x00"), "1", "", "-"]
    assert reader.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert [kind for _, kind in reader.classes] == [None, "n"] * 3


def test_escape_is_safe_in_attributes() -> None:
    assert escape("\"'<&>") == "&quot;&#x27;&lt;&amp;&gt;"


def test_numbers_that_are_none() -> None:
    assert [number(value, ".2f") for value in (1.005, None, float("nan"), float("inf"), 0.0)] == [
        "1.00",
        "-",
        "-",
        "-",
        "0.00",
    ]
