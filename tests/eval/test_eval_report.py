"""Pages and plots: well-formed, self-contained, hostile names inert, marks where the data are."""

import itertools
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.comparison import Comparison, Row, facts
from eval.divergence import Divergence
from eval.layers import MatrixError
from eval.plots import HEIGHT, WIDTH, Axis, Point, Scale, pareto, scatter
from eval.report import heat, page, write_page
from eval.saved import read_measurements

EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</pre></style></title><!-- ",
    "a\x1b[31m&amp;\u202e\x00",
    "javascript:alert(1)//https://evil.example/x.js",
)
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Strict(HTMLParser):
    """Fails on tags that do not match, and notes all that a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.nodes: list[tuple[str, dict[str, str], list[str]]] = []
        self._path: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag}: an attribute twice"
        if tag not in VOID:
            self.open.append(tag)
            self._path.append(len(self.nodes))
            self.nodes.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()
        self._path.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._path:
            self.nodes[self._path[-1]][2].append(data)

    def find(self, tag: str, kind: str = "") -> list[tuple[dict[str, str], str]]:
        """(attributes, text) of all elements of a tag and class."""
        found = (node for node in self.nodes if node[0] == tag and kind in ("", *node[1].get("class", "").split()))
        return [(attributes, "".join(texts)) for _, attributes, texts in found]


def divergence(mean: float, nll: float = 3.0) -> Divergence:
    return Divergence(
        tokens=100, windows=4, mean=mean, stderr=mean / 10, median=mean / 2, p90=2 * mean, p99=5 * mean, max=9 * mean,
        top1=0.9, top5=0.99, by_position=((1, 15, mean),), nll_p=2.9, nll_q=nll, stderr_q=0.01, seconds=1.0,
        partial=False,
    )  # fmt: skip


def row(name: str, kl: float = 0.01, size: int = 4_000_000, **changes: object) -> Row:
    values: dict[str, object] = {
        "name": name, "path": f"/models/{name}", "cache": "fp16", "format": "exl2", "bits_per_weight": 4.0,
        "head_bits": 6.0, "file_bytes": size, "memory_bytes": 3 * size, "context": 1024, "nll": 3.0,
        "nll_stderr": 0.02, "tokens": 100, "windows": 4, "divergence": divergence(kl), "conditions": "cpu",
    }  # fmt: skip
    return Row(**{**values, **changes})  # type: ignore[arg-type]


def comparison(*rows: Row, **changes: object) -> Comparison:
    values: dict[str, object] = {
        "command": "compare", "protocol": "gptq: text", "rows": rows, "windows": 4, "reference": "/models/source",
        "source": "source in float32", "floor": divergence(1e-4),
    }  # fmt: skip
    return Comparison(**{**values, **changes})  # type: ignore[arg-type]


def evil_page() -> str:
    rows = [row(name, kl=0.01 * (i + 1), size=10**6 * (i + 1)) for i, name in enumerate(EVIL)]
    rows.append(Row(name=EVIL[0], path=EVIL[1], cache="q8", problem=f"broken: {EVIL[1]}"))
    errors = tuple(MatrixError(layer=i, kind=EVIL[1], bits=4.0, error=0.1 * i) for i in range(3))
    return page(
        comparison(
            *rows,
            protocol=" ".join(EVIL),
            source=EVIL[3],
            reference=f"/x/{EVIL[0]}",
            layers={f"/models/{EVIL[1]}": errors},
            flaws={EVIL[2]: EVIL[3]},
            interrupted=True,
        )
    )


def test_hostile_names_are_text() -> None:
    found = Strict(evil_page())
    assert found.tags <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table", "thead", "tbody"),
        *("tr", "th", "td", "small", "svg", "desc", "rect", "line", "text", "circle", "polyline", "details"),
        *("summary", "pre"),
    }
    allowed = {"href", "src"} & {name for _, name, _ in found.attributes}
    assert not allowed and not [name for _, name, _ in found.attributes if name.startswith("on")]
    shown = "".join(found.texts)
    for name in EVIL[:4]:
        assert name in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", evil_page()), "control characters"


def test_page_needs_nothing_else() -> None:
    text = page(comparison(row("a"), row("b", kl=0.1)))
    found = Strict(text)
    style = found.find("style")[0][1]
    assert "prefers-color-scheme:dark" in style and "url(" not in style and "@import" not in style
    assert not re.search(r"https?://|//[a-z]", text)
    assert {"script", "link", "iframe", "img", "object"}.isdisjoint(found.tags)
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for attributes, _ in found.find("svg"):
        assert set(attributes["aria-labelledby"].split()) <= set(ids) and attributes["role"] == "img"


def test_everything_measured_is_on_the_page() -> None:
    rows = (row("a", kl=0.01234, nll=math.log(7.25)), row("b", cache="q8", partial=True, windows=2))
    text = "".join(Strict(page(comparison(*rows, interrupted=True))).texts)
    for part in ("0.01234", "7.2500 ± 0.1450", "123.4", "4.0 MB", "12.0 MB", "90.00", "gptq: text", "q8"):
        assert part in text, part
    assert "PARTIAL: b, q8: 2 of 4 windows" in text
    assert "(source in bf16)" in text and "(source in fp32)" in text


def test_page_without_a_reference_and_without_rows() -> None:
    bare = comparison(row("a", divergence=None), reference="", source="", floor=None)
    found = Strict(page(bare))
    assert len(found.find("svg")) == 1 and "KL mean" not in "".join(found.texts)
    Strict(page(comparison(reference="", source="", floor=None)))
    Strict(page(comparison(row("a"), command="cache", reference="", own=True)))


def test_no_divergence_has_no_place_on_a_log_scale() -> None:
    found = Strict(page(comparison(row("same", kl=0.0), row("other"))))
    assert "Too close to the reference for a place on the log scale: same." in [text for _, text in found.find("p")]
    assert [len(found.find("circle"))] == [1 + 2]


def test_page_gives_its_figures_to_recommend(tmp_path: Path) -> None:
    rows = (row("a<b>&amp;", kl=0.011), row("b", cache="q8", kl=0.022), row("c", divergence=None, problem="gone"))
    write_page(tmp_path / "r.html", comparison(*rows))
    found = read_measurements(tmp_path / "r.html")
    assert [(one.name, one.cache, one.kl, one.file_bytes) for one in found.rows] == [
        ("a<b>&amp;", "fp16", 0.011, 4_000_000),
        ("b", "q8", 0.022, 4_000_000),
    ]
    assert not found.own and "gptq: text" in found.label
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_a_partial_row_is_marked_and_compared_with_nothing(tmp_path: Path) -> None:
    rows = (row("whole"), row("cut", kl=0.001, partial=True, windows=1))
    write_page(tmp_path / "r.html", comparison(*rows, interrupted=True))
    found = Strict((tmp_path / "r.html").read_text())
    assert "cut (partial)" in [text for _, text in found.find("td")]
    assert {text for _, text in found.find("text", "label")} == {"whole"}
    assert [one.name for one in read_measurements(tmp_path / "r.html").rows] == ["whole"]


def test_heat_grows_with_the_error() -> None:
    errors = [0.0, 0.001, 0.01, 0.1, 0.5]
    values = [heat(error, 0.001, 0.5) for error in errors]
    assert values == sorted(values) and values[0] == 0.0 and values[1] == pytest.approx(0.05) and values[-1] == 0.8
    assert heat(0.1, 0.1, 0.1) == heat(math.inf, 0.1, 0.5) == 0.8
    layered = {"/models/a": tuple(MatrixError(layer=i, kind="q_proj", bits=3.5, error=e) for i, e in enumerate(errors))}
    cells = Strict(page(comparison(row("a"), layers=layered))).find("td")
    shown = [text for attributes, text in cells if "style" in attributes]
    assert [text.split()[0] for text in shown] == ["0.000", "0.001", "0.010", "0.100", "0.500"]


def test_facts_have_no_nan() -> None:
    import json

    bare = Row(name="a", path="b", cache="c", problem="gone")
    json.dumps(facts(comparison(bare, row("b", nll=math.nan))), allow_nan=False)


# --- plots ------------------------------------------------------------------------------------------------------------


def axis_of(ticks: list[tuple[float, float]], log: bool):
    """(place, value) of tick labels -> a function from place to value; all ticks must agree."""
    (p0, v0), (p1, v1) = ticks[0], ticks[-1]
    forth, back = (math.log, math.exp) if log else (float, float)

    def value(place: float) -> float:
        return back(forth(v0) + (place - p0) / (p1 - p0) * (forth(v1) - forth(v0)))

    for place, shown in ticks:
        assert value(place) == pytest.approx(shown, rel=2e-3)
    return value


@pytest.mark.parametrize("seed", range(6))
def test_marks_are_where_the_data_are(seed: int) -> None:
    rng = random.Random(seed)
    log = seed % 2 == 0
    count = rng.randint(2, 25)
    points = [
        Point(rng.uniform(3, 90), 10 ** rng.uniform(-4, 0) if log else rng.uniform(5, 30), f"m{i}")
        for i in range(count)
    ]
    drawn = scatter(points, Axis("size"), Axis("KL", log=log), title="t", description="d", name="p")
    found = Strict(drawn)
    across = axis_of([(float(a["x"]), float(text)) for a, text in found.find("text", "x")], False)
    up = axis_of([(float(a["y"]), float(text)) for a, text in found.find("text", "y")], log)
    marks = found.find("circle")
    assert len(marks) == count
    for point, (attributes, _) in zip(points, marks, strict=True):
        x, y = float(attributes["cx"]), float(attributes["cy"])
        assert across(x) == pytest.approx(point.x, abs=0.05)
        assert up(y) == pytest.approx(point.y, rel=2e-3 if log else 5e-3)
        assert 0 < x < WIDTH and 0 < y < HEIGHT
    best = {i for i, (attributes, _) in enumerate(marks) if "best" in attributes["class"]}
    assert best == brute_front([(point.x, point.y) for point in points])
    assert [text for _, text in found.find("text", "label")] == [point.label for point in points]
    assert found.find("title")[0][1] == "t" and found.find("desc")[0][1] == "d"


def brute_front(values: list[tuple[float, float]]) -> set[int]:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    return {i for i, value in enumerate(values) if not any(beats(other, value) for other in values)}


def test_pareto_front_against_all_pairs() -> None:
    rng = random.Random(1)
    for _ in range(300):
        values = [(float(rng.randint(0, 5)), float(rng.randint(0, 5))) for _ in range(rng.randint(1, 9))]
        assert set(pareto(values)) == brute_front(values), values


def test_ticks_are_round_and_inside() -> None:
    rng = random.Random(2)
    for log in (False, True):
        for _ in range(200):
            low = 10 ** rng.uniform(-6, 6)
            high = low * (5 * 10 ** rng.uniform(0, 5) if log else 1 + 10 ** rng.uniform(-3, 3))
            ticks = Scale(low, high, 0, 100, log).ticks()
            assert 2 <= len(ticks) <= 13 and all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
            assert ticks == sorted(set(ticks))
            if log:
                assert all(f"{tick:.5e}"[0] in "125" for tick in ticks)
            else:
                steps = {f"{b - a:.3g}" for a, b in itertools.pairwise(ticks)}
                assert len(steps) == 1 and steps.pop().strip("0.e+-")[:1] in "125"


def test_labels_do_not_cover_each_other() -> None:
    points = [Point(4.0 + 0.3 * i, 0.01 * 2**-i, f"model-{i}.0bpw") for i in range(8)]
    found = Strict(scatter(points, Axis("x"), Axis("y", log=True), title="", description="", name="p"))
    boxes = []
    for attributes, text in found.find("text", "label"):
        width, x, y = 6.6 * len(text), float(attributes["x"]), float(attributes["y"])
        start = {"start": x, "end": x - width, "middle": x - width / 2}[attributes["text-anchor"]]
        boxes.append((start, y - 11, start + width, y + 3))
    for one, other in itertools.combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)


@pytest.mark.parametrize(
    "points",
    [[], [Point(1.0, math.nan, "a")], [Point(math.inf, 1.0, "a")], [Point(1.0, 0.0, "a"), Point(1.0, -1.0, "b")]],
)
def test_nothing_to_draw(points: list[Point]) -> None:
    assert scatter(points, Axis("x"), Axis("y", log=True), title="", description="", name="p") == ""


def test_one_point_and_equal_points() -> None:
    for points in ([Point(5.0, 0.1, "a")], [Point(5.0, 0.1, "a"), Point(5.0, 0.1, "b")], [Point(0.0, 1.0, "a")]):
        found = Strict(scatter(points, Axis("x"), Axis("y", log=True), title="", description="", name="p"))
        assert len(found.find("circle", "best")) == len(points)
        assert "nan" not in str(found.attributes) and "inf" not in str(found.attributes)
