"""The rows for people, in Markdown, and for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from .running import Result
from .targets import Card, Row

MET = {True: "yes", False: "NO", None: "not measured"}


def markdown(rows: Sequence[Row], card: Card, bench: Mapping[str, Result]) -> str:
    """The table of targets, and one of every operation that was timed."""
    lines = [
        f"# {card.name}",
        "",
        f"Compute capability {card.capability[0]}.{card.capability[1]}, {card.memory / 2**30:.0f} GiB, "
        f"torch {card.torch}, {card.cores} CPU cores. Medians; floors from the bandwidth of copying, measured in the "
        "same run.",
        "",
        "| what | measured | floor | target | met |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        met = "not measured" if row.measured == "-" else MET[row.met]
        cells = (row.name, row.measured, row.floor, row.target, met if not row.note else f"{met} ({row.note})")
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    operations = [one for name in ("kernels", "attention") for one in _operations(bench.get(name))]
    if operations:
        lines += ["", "| operation | stored | m | us | GB/s | of the floor | torch |", "|---|---|---|---|---|---|---|"]
        for one in operations:
            seconds = one["seconds"]["median"]
            others = ", ".join(
                f"{name} {times['median']:.2f} x" for name, times in one["times_as_fast_as_torch"].items()
            )
            cells = (
                one["name"],
                one["stored"],
                str(one["m"]),
                f"{1e6 * seconds:.1f}",
                f"{one['bytes'] / seconds / 1e9:.0f}",
                f"{100 * one['share_of_floor']:.0f} %",
                others,
            )
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def facts_of(rows: Sequence[Row], card: Card, found: Mapping[str, Result]) -> dict[str, object]:
    """Everything, as one JSON object."""
    return {
        "card": asdict(card),
        "rows": [asdict(row) for row in rows],
        "stages": {name: asdict(result) for name, result in found.items()},
    }


def _operations(result: Result | None) -> list:
    return [] if result is None or result.why is not None else list(result.facts["operations"])  # type: ignore[call-overload]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
