"""A comparison as one HTML page that needs nothing else: no scripts, nothing loaded from elsewhere.

Names of models and files are escaped wherever they stand. The page carries the facts, so that `recommend` can read it.
"""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exl_runtime.files import write_bytes

from .comparison import Comparison, Row, conditions, facts, legend, partial_lines, table
from .divergence import RESOLUTION
from .plots import Axis, Point, scatter
from .saved import FACTS_ID
from .tables import escape

if TYPE_CHECKING:
    from .layers import MatrixError

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2530;--dim:#667;--line:#d5d9e0;--paper:#fff;--mark:#2f6db5;--best:#c2571a}
@media(prefers-color-scheme:dark){:root{--ink:#dfe4ea;--dim:#98a2b0;--line:#39414d;--paper:#14181d;--mark:#79aee8;
--best:#f0955a}}
body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1em;color:var(--ink);
background:var(--paper)}
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em}h3{font-size:1em;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse}caption{text-align:left;color:var(--dim)}
td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
.n{text-align:right;font-variant-numeric:tabular-nums}.warn{border-left:.3em solid var(--best);padding-left:.7em}
.note{color:var(--dim)}svg.plot{max-width:100%;height:auto}.frame{fill:none;stroke:var(--line)}
.grid{stroke:var(--line);stroke-width:.6}.leader{stroke:var(--dim);stroke-width:.6}.tick,.axis,.label{font-size:12px;fill:var(--dim)}
.x,.axis{text-anchor:middle}.y{text-anchor:end;dominant-baseline:middle}.label{font-size:11px;fill:var(--ink)}
.point{fill:var(--mark)}.best{fill:var(--best)}.front{fill:none;stroke:var(--best);stroke-dasharray:5 4}
.heat td{text-align:right;font-variant-numeric:tabular-nums}.heat small{color:var(--dim)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px}
"""
_HEAT = "210,90,30"  # red, green, blue of the largest error; smaller ones are more transparent
MEGA = 1e6


def write_page(path: Path, comparison: Comparison) -> None:
    """The page as `path`, whole or not at all. Raises StorageError."""
    write_bytes(path, page(comparison).encode("utf-8"))


def page(comparison: Comparison) -> str:
    """The whole HTML document."""
    title = _title(comparison)
    parts = [f"<h1>{escape(title)}</h1>"]
    if comparison.interrupted:
        parts += [f'<p class="warn">{escape(line)}</p>' for line in partial_lines(comparison)]
    parts += [
        f'<p class="warn">{escape(row.label)} was not measured: {escape(row.problem)}</p>' for row in comparison.failed
    ]
    parts.append(f'<div class="wide">\n{table(comparison).html()}\n</div>')
    parts += [f'<p class="note">{escape(line)}</p>' for line in legend(comparison)]
    parts += ["<h2>Protocol</h2>", f"<p>{escape(comparison.protocol, 2000)}</p>"]
    parts += [f"<p>{escape(line)}</p>" for line in conditions(comparison)]
    if comparison.source:
        parts.append(f"<p>Reference: {escape(comparison.source)}</p>")
    parts += _plots(comparison)
    parts += _layers(comparison)
    data = html.escape(json.dumps(facts(comparison), allow_nan=False), quote=False)
    parts.append(f'<details><summary>The figures as JSON</summary><pre id="{FACTS_ID}">{data}</pre></details>')
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    )
    return "\n".join([head, *parts, "</body></html>\n"])


def _title(comparison: Comparison) -> str:
    if comparison.command == "cache":
        return f"Cache types of {comparison.rows[0].name}" if comparison.rows else "Cache types"
    against = f" against {Path(comparison.reference).name}" if comparison.reference else ""
    return f"{len(dict.fromkeys(row.path for row in comparison.rows))} models{against}"


# --- plots ------------------------------------------------------------------------------------------------------------


def _plots(comparison: Comparison) -> list[str]:
    whole = [row for row in comparison.rows if not row.partial]  # fewer windows are another text
    if comparison.command == "cache":
        size, what = Axis("cache, bytes per token"), "bytes of cache per token"
        rows = [(row, row.bytes_per_token, row.cache) for row in whole]
    else:
        size, what = Axis("size of the weights, MB"), "size of the weights"
        rows = [
            (row, row.file_bytes / MEGA, row.label if comparison.caches > 1 else row.name)
            for row in whole
            if row.file_bytes is not None
        ]
    judged = [(row, x, label, row.divergence.mean) for row, x, label in rows if row.divergence is not None]
    # The source itself, or as good as that: on a log scale it would squeeze all others into a corner.
    same = [label for _, _, label, mean in judged if not mean >= RESOLUTION]
    kl = [Point(x, mean, label, _told(row)) for row, x, label, mean in judged if mean >= RESOLUTION]
    perplexity = [Point(x, row.perplexity, label, _told(row)) for row, x, label in rows if not math.isnan(row.nll)]
    parts = []
    for name, points, axis in (
        ("kl", kl, Axis("KL divergence, nats per token", log=True)),
        ("perplexity", perplexity, Axis("perplexity")),
    ):
        heading = f"{what[0].upper()}{what[1:]} against {'KL divergence' if name == 'kl' else name}"
        drawn = scatter(
            points, size, axis, title=heading, description=_description(points, heading), name=f"plot-{name}"
        )
        if not drawn:
            continue
        parts += [f"<h2>{heading}</h2>", drawn, f'<p class="note">{_reading(name == "kl")}</p>']
    if same:
        named = escape(", ".join(same))
        parts.append(f'<p class="note">Too close to the reference for a place on the log scale: {named}.</p>')
    return parts


def _reading(kl: bool) -> str:
    better = "Less of both is better: the dashed line joins what no other beats in both (the Pareto front)."
    return better if kl else f"{better} Perplexities within each other's standard errors are not told apart."


def _description(points: Sequence[Point], heading: str) -> str:
    return f"{heading}. " + " ".join(f"{point.label}: {point.x:.5g}, {point.y:.5g}." for point in points)


def _told(row: Row) -> str:
    kl = "" if row.divergence is None else f", KL {row.divergence.mean:.6f}"
    return f"{row.label}: {row.bits_per_weight:.2f} bits per weight, perplexity {row.perplexity:.4f}{kl}"


# --- layers -----------------------------------------------------------------------------------------------------------


def _layers(comparison: Comparison) -> list[str]:
    if not comparison.layers and not comparison.flaws:
        return []
    names = {row.path: row.name for row in comparison.rows}
    parts = [
        "<h2>Errors of the matrices</h2>",
        '<p class="note">||Wq - W|| / ||W|| of every stored matrix against the source, and its bits per weight in '
        "small type. The stronger the colour, the larger the error; the scale is the same for all variants. It says "
        "nothing of how much a matrix matters: compare the same matrix in two variants.</p>",
    ]
    parts += [
        f'<p class="warn">{escape(names.get(path, path))}: {escape(why)}</p>' for path, why in comparison.flaws.items()
    ]
    found = [entry.error for errors in comparison.layers.values() for entry in errors if _visible(entry.error)]
    low, high = (min(found), max(found)) if found else (1.0, 1.0)
    for path, errors in comparison.layers.items():
        parts += [f"<h3>{escape(names.get(path, path))}</h3>", _heat(errors, low, high)]
    return parts


def _heat(errors: "Sequence[MatrixError]", low: float, high: float) -> str:
    kinds = list(dict.fromkeys(entry.kind for entry in errors))
    layers = list(dict.fromkeys(entry.layer for entry in errors))
    by_place = {(entry.layer, entry.kind): entry for entry in errors}
    head = "".join(f'<th scope="col">{escape(kind)}</th>' for kind in kinds)
    parts = [
        '<div class="wide"><table class="heat">',
        f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>',
    ]
    for layer in layers:
        cells = "".join(_cell(by_place.get((layer, kind)), low, high) for kind in kinds)
        parts.append(f'<tr><th scope="row">{"head" if layer is None else layer}</th>{cells}</tr>')
    return "\n".join([*parts, "</tbody></table></div>"])


def _cell(entry: "MatrixError | None", low: float, high: float) -> str:
    if entry is None:
        return "<td></td>"
    shown = f"{entry.error:.3f}" if math.isfinite(entry.error) else "not finite"
    style = f' style="background:rgba({_HEAT},{heat(entry.error, low, high):.2f})"'
    return f"<td{style}>{shown} <small>{entry.bits:.1f}</small></td>"


def heat(error: float, low: float, high: float) -> float:
    """0.05 for the smallest error there is, 0.8 for the largest, equal steps for equal ratios; 0 for no error."""
    if not error > 0:
        return 0.0
    if not math.isfinite(error) or low >= high:
        return 0.8
    return 0.05 + 0.75 * min(1.0, max(0.0, math.log(error / low) / math.log(high / low)))


def _visible(error: float) -> bool:
    return math.isfinite(error) and error > 0
