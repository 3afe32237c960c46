"""`exl info`: what a model folder holds and how much memory it takes, without loading it."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from .options import add_model, add_output, cache_or_auto, length_or_auto

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..model.summary import ModelSummary

HELP = "architecture, format, bits per weight by kind of matrix, memory for a context length"
NOTES_FROM = 36  # columns of the terminal in which the notes on memory have room for a word or two
USAGE = "MODEL [--context N] [--cache TYPE] [--json]"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser, optional=True)
    parser.add_argument(
        "--context",
        type=length_or_auto,
        default="auto",
        metavar="N",
        help="tokens to plan memory for",
    )
    parser.add_argument(
        "--cache", type=cache_or_auto, default="auto", metavar="TYPE", help="cache type to plan memory for (auto)"
    )
    parser.add_argument("--device", default="auto", help="where it would run: auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Read the headers and print. Raises ExlError."""
    from ..model.placement import resolve_device
    from ..model.summary import summarize
    from ..runtime.load import find

    context = None if args.context == "auto" else args.context
    summary = summarize(find(args.model), context, cache=args.cache, device=str(resolve_device(args.device)))
    if args.json:
        sys.stdout.write(json.dumps(asdict(summary)) + "\n")
    else:
        show(summary)
    return 0


def show(summary: "ModelSummary") -> None:
    """Two small tables on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..chat.status import size
    from ..console.terminal import clean_line

    console = Console(highlight=False, markup=False, emoji=False)

    def row(table: Table, *cells: str) -> None:
        table.add_row(*(Text(clean_line(cell)) for cell in cells))

    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    row(facts, "model", summary.name)
    row(facts, "folder", summary.path)
    row(facts, "architecture", summary.architecture)
    row(facts, "format", f"{summary.format}, {summary.bits_per_weight:.2f} bits per weight in the layers")
    row(facts, "parameters", f"{summary.parameters:,}")
    row(facts, "context", f"{summary.context_length} tokens")
    row(facts, "files", size(summary.file_bytes))
    for layers, window in summary.windows:
        row(facts, "window", f"{layers} of {summary.layers} layers see the last {window} tokens, and keep no more")
    for line in summary.attention:
        row(facts, "attention", line)
    console.print(facts)
    kinds = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold", title_justify="left")
    kinds.add_column("kind")
    for heading in ("matrices", "weights", "bits"):
        kinds.add_column(heading, justify="right", no_wrap=True)
    kinds.add_column("format")
    for kind in summary.kinds:
        cells = (f"{kind.matrices}", f"{kind.weights:,}", f"{kind.bits_per_weight:.2f}", ", ".join(kind.formats))
        row(kinds, kind.kind, *cells)
    console.print()
    _show(console, kinds, console.measure(kinds, options=console.options.update(max_width=1 << 16)).maximum)
    memory = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    memory.add_column(style="bold", no_wrap=True)
    memory.add_column(justify="right", no_wrap=True)
    memory.add_column(style="dim", overflow="fold")
    row(memory, "weights", size(summary.weight_bytes), "as stored")
    row(memory, "cache", size(summary.cache_bytes), f"{summary.context} tokens in {summary.cache_dtype}, at least")
    row(memory, "working", size(summary.working_bytes), "while it computes")
    if summary.load_cache_bytes:
        what = f"for {summary.load_context} tokens, batches and earlier prompts: what a load takes now"
        row(memory, "cache in use", size(summary.load_cache_bytes), what)
    fits = "fits" if summary.total_bytes <= summary.free_bytes else "does not fit: choose a shorter --context"
    row(memory, "needed", size(summary.total_bytes), f"{size(summary.free_bytes)} are free now: {fits}")
    console.print()
    _show(console, memory, NOTES_FROM)


def _show(console: "Console", table: "Table", width: int) -> None:
    """The table where there are `width` columns; else its rows as text: cut numbers would be wrong numbers."""
    if console.width >= width:
        console.print(table)
        return
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        said = [f"{column.header} {cell}".strip() for column, cell in zip(table.columns, cells, strict=True)][1:]
        console.print(f"{cells[0]}: {', '.join(said)}")
