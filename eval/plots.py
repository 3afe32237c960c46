"""Scatter plots as inline SVG: no scripts, nothing loaded from elsewhere. Knows nothing of models.

Colours come from the page's style sheet (classes frame, grid, tick, axis, point, front, leader, label), so that a plot
follows the light or dark scheme of the page. Labels and titles are escaped.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .tables import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 20, 52  # room around the frame
CHARACTER, LINE = 6.6, 14  # size of a label's letters, in the same units as everything here
RADIUS = 4.5
MARGIN = 0.06  # of the data's range, free at both ends of an axis


@dataclass(frozen=True, slots=True)
class Point:
    """One labelled mark. `text`: what a reader sees who points at it."""

    x: float
    y: float
    label: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """A title, and whether equal distances mean equal ratios."""

    title: str
    log: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """Data low ... high to places start ... stop on the paper. `low` < `high`; both above 0 on a log scale."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` stands."""
        low, high, at = (map(math.log, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round numbers between `low` and `high`; 1, 2 and 5 times powers of ten, at least two of them."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def scatter(points: Sequence[Point], x: Axis, y: Axis, *, title: str, description: str, name: str) -> str:
    """An `svg` element with every point that can be shown, and the Pareto front (less of both is better) as a line.

    name  makes the ids inside unique on the page; letters, digits and dashes
    Points that are not finite, or not above 0 on a log axis, have no place on the paper and are left out; "" when none
    is left.
    """
    shown = [point for point in points if _has_place(point.x, x) and _has_place(point.y, y)]
    if not shown:
        return ""
    across = _scale([point.x for point in shown], LEFT, WIDTH - RIGHT, x.log)
    up = _scale([point.y for point in shown], HEIGHT - BOTTOM, TOP, y.log)
    front = pareto([(point.x, point.y) for point in shown])
    parts = [
        f'<svg class="plot" role="img" aria-labelledby="{name}-t {name}-d" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' width="{WIDTH}" height="{HEIGHT}">',
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description, 4000)}</desc>',
        *_axes(across, up, x, y),
        _front_line([(across.place(shown[i].x), up.place(shown[i].y)) for i in front]),
        *_marks(shown, across, up, frozenset(front)),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def pareto(values: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of those that no other beats (less or equal in both, less in one), in the order of the first value."""
    front: list[int] = []
    for index in sorted(range(len(values)), key=lambda i: (values[i], i)):
        if not front or values[index][1] < values[front[-1]][1] or values[index] == values[front[-1]]:
            front.append(index)
    return front


def _has_place(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _scale(values: Iterable[float], start: float, stop: float, log: bool) -> Scale:
    values = list(values)
    low, high = min(values), max(values)
    if log:
        # At least a factor of 5, or there might be a single tick.
        low, high = math.log(low), math.log(high)
        spare = max(MARGIN * (high - low), (math.log(5) - (high - low)) / 2)
        return Scale(math.exp(low - spare), math.exp(high + spare), start, stop, log=True)
    spare = MARGIN * (high - low) or abs(low) * 0.1 or 1.0
    return Scale(low - spare, high + spare, start, stop)


def _linear_ticks(low: float, high: float) -> list[float]:
    """About six, at a distance of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [float(f"{factor}e{decade}") for decade in decades for factor in (1, 2, 5)]
    inside = [tick for tick in every if low <= tick <= high]
    whole = [tick for tick in inside if f"{tick:e}"[0] == "1"]
    return whole if len(inside) > 9 and len(whole) > 1 else inside


def tick_text(value: float) -> str:
    """0.002, 15, 1e-05: as short as the number allows."""
    return f"{value:.6g}"


def _axes(across: Scale, up: Scale, x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/>']
    for tick in across.ticks():
        at = across.place(tick)
        parts.append(f'<line class="grid" x1="{at:.2f}" x2="{at:.2f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick x" x="{at:.2f}" y="{bottom + 18}">{tick_text(tick)}</text>')
    for tick in up.ticks():
        at = up.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.2f}" y2="{at:.2f}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 8}" y="{at:.2f}">{tick_text(tick)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="axis" x="{(LEFT + right) / 2}" y="{HEIGHT - 12}">{escape(x.title)}</text>')
    parts.append(
        f'<text class="axis" x="16" y="{middle}" transform="rotate(-90 16 {middle})">{escape(y.title)}'
        f"{' (log scale)' if y.log else ''}</text>"
    )
    return parts


def _front_line(places: Sequence[tuple[float, float]]) -> str:
    if len(places) < 2:
        return ""
    return f'<polyline class="front" points="{" ".join(f"{a:.2f},{b:.2f}" for a, b in places)}"/>'


def _marks(points: Sequence[Point], across: Scale, up: Scale, front: frozenset[int]) -> list[str]:
    places = [(across.place(point.x), up.place(point.y)) for point in points]
    room = 2 * RADIUS  # or a label beside one mark looks like that of its neighbour
    taken = [(a - room, b - RADIUS, a + room, b + RADIUS) for a, b in places]
    parts = []
    for index, (point, (a, b)) in enumerate(zip(points, places, strict=True)):
        best = " best" if index in front else ""
        text = escape(point.text or point.label)
        parts.append(
            f'<circle class="point{best}" cx="{a:.2f}" cy="{b:.2f}" r="{RADIUS}"><title>{text}</title></circle>'
        )
        label = point.label if len(point.label) <= 34 else f"{point.label[:16]}…{point.label[-17:]}"
        box, anchor = _free_box(a, b, len(label) * CHARACTER, taken)
        taken.append(box)
        if abs((box[1] + box[3]) / 2 - b) > LINE / 2:  # not beside its mark: a line says whose it is
            near = (min(max(a, box[0]), box[2]), box[1] if box[1] > b else box[3])
            parts.append(f'<line class="leader" x1="{a:.2f}" y1="{b:.2f}" x2="{near[0]:.2f}" y2="{near[1]:.2f}"/>')
        at = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
        parts.append(
            f'<text class="label" x="{at:.2f}" y="{box[3] - 3:.2f}" text-anchor="{anchor}">{escape(label)}</text>'
        )
    return parts


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _free_box(a: float, b: float, width: float, taken: Sequence[Box]) -> tuple[Box, str]:
    """A place beside a mark for a label of this width: the one that covers least of what is there already."""
    gap, half = 2 * RADIUS, LINE / 2
    places: list[tuple[Box, str]] = []
    for rise in (0, -LINE, LINE, -2 * LINE, 2 * LINE):
        places.append(((a + gap, b + rise - half, a + gap + width, b + rise + half), "start"))
        places.append(((a - gap - width, b + rise - half, a - gap, b + rise + half), "end"))
        if rise:
            places.append(((a - width / 2, b + rise - half, a + width / 2, b + rise + half), "middle"))
    return min(places, key=lambda place: _covered(place[0], taken))


def _covered(box: Box, taken: Sequence[Box]) -> float:
    """Area of `box` over what is taken, or outside the frame."""
    area = sum(_common(box, other) for other in taken)
    whole = (box[2] - box[0]) * (box[3] - box[1])
    return area + whole - _common(box, (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM))


def _common(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, down)
