"""Reports: numbers read back from every form, and names that try to be markup."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from convert.report import Divergence, MatrixReport, Report, from_json, to_html, to_json, to_markdown, write_report
from exl_runtime.errors import ConvertError
from exl_runtime.files import read_json

MATRICES = (
    MatrixReport(
        path="model.layers.0.self_attn.q_proj",
        bits_per_weight=4.263,
        layout="0.125:5b_64g/0.875:4b_64g",
        error=0.0321,
        flags=("damped",),
        seconds=1.5,
        weights=100,
    ),
    MatrixReport(path="model.layers.0.mlp.up_proj", bits_per_weight=3.063, layout="1:3b_64g", error=0.25, weights=300),
    MatrixReport(
        path="language_model.model.layers.11.mlp.experts.7.w2", bits_per_weight=8.5, layout="", error=math.nan
    ),
    MatrixReport(path="lm_head", bits_per_weight=6.25, layout="1:6b_128g", error=0.001, seconds=0.0),
)
REPORT = Report(
    source="ember-6m",
    settings={"bits": 4.125, "seed": 7, "files": ["a.txt", "b.txt"], "unset": None, "flag": True},
    calibration="100 rows of 2048 tokens from a.txt.\n\nRows are cut in the order of the file.",
    bits_target=4.125,
    bits_stored=4.0972,
    head_bits=6,
    bytes=4_772_188,
    seconds={"capture": 12.34, "encode": 100.5},
    matrices=MATRICES,
    divergence=(
        Divergence(
            tokens=24576,
            kl_mean=0.01564,
            kl_median=0.00421,
            kl_p99=0.1873,
            top1=0.9473,
            perplexity=2.4213,
            source_perplexity=2.3801,
            text="held-out stories",
        ),
    ),
    warnings=("layers.0.mlp.up_proj: rare expert, 12 tokens only",),
)
HOSTILE = "a|b<script>alert(1)</script>\n# x `y` [l](http://z) ![i](j) \"q'&amp; \x1b[2J \u202e \ud800 *_em_* -->]]>"


def same(a: object, b: object) -> bool:
    """Equal, NaN being equal to NaN."""
    return repr(a) == repr(b)


def cells(line: str) -> list[str]:
    """The cells of a row of a Markdown table, escapes undone."""
    parts = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [re.sub(r"\\(.)", r"\1", part.strip()) for part in parts]


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    tables = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if rows := [cells(line) for line in body.splitlines() if line.startswith("|")]:
            assert all(len(row) == len(rows[0]) for row in rows), "ragged table"
            assert all(re.fullmatch("---:?", cell) for cell in rows[1])
            tables[title] = [rows[0], *rows[2:]]
    return tables


class Page(HTMLParser):
    """Tags, attributes, texts and tables of a page; every tag must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tables: dict[str, list[list[str]]] = {}
        self.bars: list[tuple[float, str]] = []
        self._title = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "meta":
            return
        self.open.append(tag)
        if tag == "h2":
            self._title = ""
        elif tag == "table":
            self.tables[self._title] = []
        elif tag == "tr":
            self.tables[self._title].append([])
        elif tag in ("td", "th"):
            self.tables[self._title][-1].append("")
        elif tag == "rect":
            self.bars.append((float(dict(attributes)["height"] or 0), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if "h2" in self.open:
            self._title += text
        elif self.open and self.open[-1] in ("td", "th"):
            self.tables[self._title][-1][-1] += text
        elif "rect" in self.open:
            self.bars[-1] = (self.bars[-1][0], self.bars[-1][1] + text)


def test_json_and_back() -> None:
    text = json.dumps(to_json(REPORT), allow_nan=False)
    assert same(from_json(json.loads(text)), REPORT)
    value = json.loads(text)
    assert value["matrices"][2]["error"] is None and value["matrices"][1]["seconds"] is None
    assert value["matrices"][0]["error"] == 0.0321 and value["divergence"][0]["kl_p99"] == 0.1873


def test_everything_not_measured() -> None:
    empty = replace(
        REPORT, bits_stored=math.nan, seconds={"all": math.inf}, matrices=(), divergence=(), warnings=(), settings={}
    )
    text = json.dumps(to_json(empty), allow_nan=False)
    back = from_json(json.loads(text))
    assert math.isnan(back.bits_stored) and math.isnan(back.seconds["all"]) and back.matrices == ()
    for shown in (to_markdown(empty), to_html(empty)):
        assert "Not measured." in shown and "n/a" in shown and "nan" not in shown and "inf" not in shown.lower()


def check_tables(tables: dict[str, list[list[str]]]) -> None:
    summary = dict(tables["Summary"])
    assert float(summary["Bits per weight, wanted"]) == 4.125
    assert float(summary["Bits per weight, stored"]) == pytest.approx(4.0972, abs=5e-4)
    assert int(summary["Size in bytes"]) == 4_772_188 and int(summary["Bits of the head"]) == 6
    assert summary["Time: capture"] == "12.3 s" and summary["Time: all"] == "112.8 s"
    assert dict(tables["Settings"])["files"] == "a.txt, b.txt"
    row = dict(zip(*tables["Divergence from the source"], strict=True))
    assert row["text"] == "held-out stories" and int(row["tokens"]) == 24576
    assert [float(row[name]) for name in ("KL mean", "KL median", "KL 99 %")] == [0.01564, 0.00421, 0.1873]
    assert row["same top token"] == "94.73 %"
    assert float(row["perplexity"]) == 2.4213 and float(row["source's"]) == 2.3801
    assert tables["Layers"][1:] == [
        ["0", "3.363", "0.25000", "model.layers.0.mlp.up_proj"],  # (100 * 4.263 + 300 * 3.063) / 400
        ["11", "8.500", "n/a", "language_model.model.layers.11.mlp.experts.7.w2"],
        ["lm_head", "6.250", "0.00100", "lm_head"],
    ]
    rows = tables["Matrices"][1:]
    assert [row[0] for row in rows] == [entry.path for entry in MATRICES]
    assert rows[0] == [MATRICES[0].path, "4.263", "0.125:5b_64g/0.875:4b_64g", "0.03210", "1.50", "damped"]
    assert rows[2][3] == "n/a" and rows[3][4] == "0.00"


def test_an_error_that_is_not_a_number_is_the_largest() -> None:
    matrices = tuple(
        replace(MATRICES[0], path=f"layers.0.m{n}", error=error) for n, error in enumerate((9, math.nan, 8))
    )
    row = markdown_tables(to_markdown(replace(REPORT, matrices=matrices)))["Layers"][1]
    assert row[2:] == ["n/a", "layers.0.m1"]


def test_numbers_in_markdown() -> None:
    text = to_markdown(REPORT)
    check_tables(markdown_tables(text))
    assert text.index("rare expert") < text.index("Summary"), "warnings come first"
    assert "q_proj" in text, "underscores inside words stay readable"
    assert "Rows are cut in the order of the file." in text.splitlines()


def test_numbers_in_html() -> None:
    page = Page(to_html(REPORT))
    check_tables(page.tables)
    assert page.bars == [
        (pytest.approx(12 * 3.363, abs=0.05), "0: 3.363 bits"),
        (pytest.approx(12 * 8.5, abs=0.05), "11: 8.500 bits"),
        (pytest.approx(12 * 6.25, abs=0.05), "lm_head: 6.250 bits"),
    ]


HOSTILE_REPORT = replace(
    REPORT,
    source=HOSTILE,
    settings={HOSTILE: HOSTILE},
    calibration=f"{HOSTILE}\n- {HOSTILE}\n1. {HOSTILE}\n=====",
    seconds={HOSTILE: 1.0},
    matrices=(
        replace(MATRICES[0], path=HOSTILE, layout=HOSTILE, flags=(HOSTILE, HOSTILE)),
        replace(MATRICES[1], path=f"layers.3.{HOSTILE}"),
    ),
    divergence=(replace(REPORT.divergence[0], text=HOSTILE),),
    warnings=(HOSTILE, f"# {HOSTILE}"),
)


def test_hostile_names_in_html() -> None:
    text = to_html(HOSTILE_REPORT)
    page = Page(text)
    plain = Page(to_html(REPORT))
    assert page.tags == plain.tags and page.attributes == plain.attributes
    assert not page.tags & {"script", "img", "a", "link", "iframe"}
    assert not {name for name in page.attributes if name.startswith("on")} | (page.attributes & {"src", "href"})
    text.encode("utf-8")
    assert not set(text) & {"\x1b", "\u202e", "\ud800"}
    assert page.tables["Matrices"][1][0].startswith("a|b<script>alert(1)</script> # x `y`")


def test_hostile_names_in_markdown() -> None:
    text = to_markdown(HOSTILE_REPORT)
    tables = markdown_tables(text)  # not ragged
    assert len(tables["Matrices"]) == 3 and tables["Matrices"][1][0].startswith("a|b&lt;script&gt;")
    assert "<" not in text and not set(text) & {"\x1b", "\u202e", "\ud800"}
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert [title.split(" ", 1)[1] for title in titles[1:]] == [
        *("Warnings", "Summary", "Calibration", "Settings", "Divergence from the source", "Layers", "Matrices")
    ]
    assert not re.search(r"(?<!\\)[`\[\]*]", text), "code, links and emphasis"
    assert not re.search(r"(?<!\\)_em", text)
    lines = text.splitlines()
    assert not [line for line in lines if re.match(r"(1\.|=)", line)], "lists and underlined titles"
    assert len([line for line in lines if line.startswith("- ")]) == 2, "the warnings are the only list"


def test_a_report_on_disk(tmp_path: Path) -> None:
    paths = write_report(tmp_path, HOSTILE_REPORT)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert same(from_json(read_json(paths[0])), HOSTILE_REPORT)
    assert paths[1].read_text(encoding="utf-8") == to_markdown(HOSTILE_REPORT)
    assert paths[2].read_text(encoding="utf-8") == to_html(HOSTILE_REPORT)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 99},
        {"bits_target": None, "surprise": 1},
        {"matrices": 3},
        {"matrices": [{"path": "x"}]},
        {"matrices": [7]},
        {"seconds": []},
    ],
    ids=str,
)
def test_damaged_reports(change: dict[str, object]) -> None:
    with pytest.raises(ConvertError, match="report"):
        from_json({**to_json(REPORT), **change})


def test_a_missing_entry() -> None:
    value = to_json(REPORT)
    del value["bits_stored"]
    with pytest.raises(ConvertError, match="bits_stored"):
        from_json(value)
