"""The report of a conversion: what was asked, what was stored, how far the result is from the source.

One `Report` becomes JSON for programs, and Markdown and HTML for people; both show the same sections. Knows no model,
no tensors. Numbers that were not measured are NaN here and null in JSON.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from exl_runtime.errors import ConvertError
from exl_runtime.files import GIB, write_bytes, write_json

FORMAT = "exl-runtime conversion report"
VERSION = 1
NONE = "n/a"
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\..*")
_RIGHT = re.compile(r"-?[\d.,]+(e[+-]?\d+)?( (%|s|GiB))?|n/a")  # cells that are set like numbers
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color-scheme:light dark}"
    "table{border-collapse:collapse}td,th{padding:.15em .7em;text-align:left;border-bottom:1px solid #8885}"
    ".n{text-align:right;font-variant-numeric:tabular-nums}rect{fill:#4a7fb5}text{font-size:10px;fill:#888}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixReport:
    """One matrix.

    bits_per_weight  as stored, overhead included        layout  for example "0.125:5b_64g/0.875:4b_64g"
    error            ||Y_q - Y|| / ||Y|| of its output   flags   what was out of the ordinary, in words
    seconds          spent encoding it                   weights how much it counts in the mean of its layer
    """

    path: str
    bits_per_weight: float
    layout: str
    error: float
    flags: tuple[str, ...] = ()
    seconds: float = math.nan
    weights: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Result against source on one text. kl_*: KL(source || result) per token, nats. top1: share of tokens, 0 .. 1."""

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1: float
    perplexity: float
    source_perplexity: float
    text: str  # which text it was


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One conversion. bits_*: average bits per weight of the layers' matrices, wanted and as stored."""

    source: str
    settings: Mapping[str, object]  # name -> JSON value
    calibration: str  # which data in which order, so that somebody else can repeat it
    bits_target: float
    bits_stored: float
    head_bits: int
    bytes: int  # of the whole folder's weight files
    seconds: Mapping[str, float]  # stage -> wall clock
    matrices: tuple[MatrixReport, ...]
    divergence: tuple[Divergence, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Section:
    title: str
    lines: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def write_report(folder: Path, report: Report) -> tuple[Path, Path, Path]:
    """Write report.json, report.md and report.html into `folder`. Raises ConvertError when they cannot be written."""
    paths = (folder / "report.json", folder / "report.md", folder / "report.html")
    write_json(paths[0], to_json(report))
    write_bytes(paths[1], to_markdown(report).encode("utf-8"))
    write_bytes(paths[2], to_html(report).encode("utf-8"))
    return paths


def to_json(report: Report) -> dict[str, Any]:
    """Plain JSON values; NaN and infinity become null."""
    return {"format": FORMAT, "version": VERSION, **_plain(asdict(report))}


def from_json(value: Mapping[str, Any]) -> Report:
    """The inverse of `to_json`; null where a float belongs is NaN. Raises ConvertError for anything else."""
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise ConvertError(
            f"not a conversion report of version {VERSION}", hint="it was written by another program or version"
        )
    try:
        known = {name: entry for name, entry in value.items() if name not in ("format", "version")}
        known["matrices"] = tuple(_record(MatrixReport, entry) for entry in known["matrices"])
        known["divergence"] = tuple(_record(Divergence, entry) for entry in known["divergence"])
        known["seconds"] = {name: math.nan if spent is None else spent for name, spent in known["seconds"].items()}
        return _record(Report, known)
    except (KeyError, TypeError, AttributeError) as err:
        raise ConvertError(f"the conversion report is damaged: {err}", hint="convert again to make a new one") from err


def to_markdown(report: Report) -> str:
    """GitHub Markdown. Names and texts from outside are escaped: they cannot make markup or table cells."""
    parts = [f"# {_md(_title(report))}"]
    for section in _sections(report):
        parts.append(f"## {_md(section.title)}")
        bullet = "- " if section.title == "Warnings" else ""
        parts += [bullet + _md(line) for line in section.lines]
        if section.rows:
            number = [_is_number(column) for column in zip(*section.rows, strict=True)]
            table = [section.head, tuple("---:" if right else "---" for right in number)]
            body = ["| " + " | ".join(map(_md, row)) + " |" for row in section.rows]
            heads = ["| " + " | ".join(map(_md, section.head)) + " |", "| " + " | ".join(table[1]) + " |"]
            parts.append("\n".join(heads + body))
    return "\n\n".join(parts) + "\n"


def to_html(report: Report) -> str:
    """One self-contained page: no scripts, nothing loaded from elsewhere, everything from outside escaped."""
    title = _html(_title(report))
    parts = [f"<h1>{title}</h1>"]
    for section in _sections(report):
        parts.append(f"<h2>{_html(section.title)}</h2>")
        parts += [f"<p>{_html(line)}</p>" for line in section.lines]
        if section.title == "Layers":
            parts.append(_bars(_layers(report)))
        if section.rows:
            number = [_is_number(column) for column in zip(*section.rows, strict=True)]
            rows = [_html_row("th", section.head, number)] + [_html_row("td", row, number) for row in section.rows]
            parts.append("<table>\n" + "\n".join(rows) + "\n</table>")
    head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    return f"{head}<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _title(report: Report) -> str:
    return f"EXL2 conversion of {report.source}"


def _sections(report: Report) -> list[_Section]:
    summary = (
        ("Bits per weight, wanted", _number(report.bits_target, ".3f")),
        ("Bits per weight, stored", _number(report.bits_stored, ".3f")),
        ("Bits of the head", str(report.head_bits)),
        ("Size of the weights", f"{report.bytes / GIB:.3f} GiB"),
        ("Size in bytes", str(report.bytes)),
        ("Matrices", str(len(report.matrices))),
        *((f"Time: {stage}", f"{_number(spent, '.1f')} s") for stage, spent in report.seconds.items()),
        ("Time: all", f"{_number(math.fsum(report.seconds.values()), '.1f')} s"),
    )
    settings = tuple((name, _text(value)) for name, value in report.settings.items())
    divergence = tuple(
        (
            entry.text,
            str(entry.tokens),
            *(_number(kl, ".5f") for kl in (entry.kl_mean, entry.kl_median, entry.kl_p99)),
            f"{_number(100 * entry.top1, '.2f')} %",
            _number(entry.perplexity, ".4f"),
            _number(entry.source_perplexity, ".4f"),
        )
        for entry in report.divergence
    )
    layers = tuple((name, _number(_mean_bits(group), ".3f"), *_worst(group)) for name, group in _layers(report).items())
    matrices = tuple(
        (
            entry.path,
            _number(entry.bits_per_weight, ".3f"),
            entry.layout,
            _number(entry.error, ".5f"),
            _number(entry.seconds, ".2f"),
            ", ".join(entry.flags),
        )
        for entry in report.matrices
    )
    measured = "How far the result's next-token probabilities are from the source's, on the same text."
    sections = [
        _Section("Warnings", report.warnings),
        _Section("Summary", head=("what", "value"), rows=summary),
        _Section("Calibration", tuple(line for line in report.calibration.splitlines() if line.strip())),
        _Section("Settings", head=("setting", "value"), rows=settings),
        _Section(
            "Divergence from the source",
            (measured if divergence else "Not measured.",),
            ("text", "tokens", "KL mean", "KL median", "KL 99 %", "same top token", "perplexity", "source's"),
            divergence,
        ),
        _Section("Layers", head=("layer", "bits", "largest error", "in"), rows=layers),
        _Section("Matrices", head=("matrix", "bits", "layout", "error", "seconds", "remarks"), rows=matrices),
    ]
    return [section for section in sections if section.rows or any(section.lines)]


def _layers(report: Report) -> dict[str, list[MatrixReport]]:
    """Matrices by layer number; those outside the layers (the head) under their own names."""
    layers: dict[str, list[MatrixReport]] = {}
    for entry in report.matrices:
        match = _LAYER.fullmatch(entry.path)
        layers.setdefault(match[1] if match else entry.path, []).append(entry)
    return layers


def _mean_bits(group: Sequence[MatrixReport]) -> float:
    weights = sum(entry.weights for entry in group)
    return sum(entry.bits_per_weight * entry.weights for entry in group) / weights if weights else math.nan


def _worst(group: Sequence[MatrixReport]) -> tuple[str, str]:
    """The largest error and the matrix that has it; one that is not a number counts as the largest."""
    worst = max(group, key=lambda entry: math.inf if math.isnan(entry.error) else entry.error)
    return _number(worst.error, ".5f"), worst.path


def _bars(layers: Mapping[str, Sequence[MatrixReport]]) -> str:
    """An SVG bar per layer, its height the mean bits of the layer; 8 bits are 96 units high."""
    width, scale, floor = 12, 12, 112
    parts = []
    for index, (name, group) in enumerate(layers.items()):
        bits = _mean_bits(group)
        height = min(max(bits, 0.0), 9.0) * scale if math.isfinite(bits) else 0.0
        label = f"{_html(name)}: {_number(bits, '.3f')} bits"
        parts.append(
            f'<rect x="{20 + index * width}" y="{floor - height:.1f}" width="{width - 2}" height="{height:.1f}">'
            f"<title>{label}</title></rect>"
        )
    parts += [f'<text x="0" y="{floor - scale * bits}">{bits}</text>' for bits in (2, 4, 6, 8)]
    total = 24 + width * len(layers)
    return (
        f'<svg role="img" aria-label="bits per layer" viewBox="0 0 {total} 120" width="{total}" height="120">'
        + "".join(parts)
        + "</svg>"
    )


def _html_row(tag: str, cells: Sequence[str], number: Sequence[bool]) -> str:
    inner = (
        f'<{tag} class="n">{_html(cell)}</{tag}>' if right else f"<{tag}>{_html(cell)}</{tag}>"
        for cell, right in zip(cells, number, strict=True)
    )
    return f"<tr>{''.join(inner)}</tr>"


def _is_number(column: Sequence[str]) -> bool:
    return all(_RIGHT.fullmatch(cell) for cell in column)


def _number(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else NONE


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return NONE if value is None else str(value)


def _shown(text: str) -> str:
    """One line without anything that steers a terminal, a browser or the direction of writing."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in text).strip()


def _html(text: str) -> str:
    return html.escape(_shown(text), quote=True)


def _md(text: str) -> str:
    text = _shown(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$!#])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it is only an underscore
    return re.sub(r"^([-+=]|\d+[.)](?=\s|$))", lambda match: re.sub(r"([-+=.)])", r"\\\1", match[0]), text)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _record(kind: type[Any], entry: Mapping[str, Any]) -> Any:
    """`kind` from its JSON object: null floats are NaN, lists of a dataclass are tuples."""
    floats = {field.name for field in fields(kind) if field.type is float}
    values = {name: math.nan if value is None and name in floats else value for name, value in entry.items()}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
