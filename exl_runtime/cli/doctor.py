"""`exl doctor`: what this machine has, what it lacks, and what to do about it."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..console.terminal import clean_line
from .options import add_output

HELP = "what is there, what is missing, what to do; builds the native kernels, clears them and packed models"
MARKS = {True: ("ok", "green"), False: ("MISSING", "red"), None: ("-", "dim")}
USAGE = "[--clean] [--build] [--json]"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--clean", action="store_true", help="remove every built library and packed model first")
    parser.add_argument("--build", action="store_true", help="build the native kernels now and load them")
    parser.add_argument("--json", action="store_true", help="the checks as a JSON list")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if nothing is wrong, 1 if a check failed. Raises BuildError when --build does not get through."""
    from ..chat.status import size
    from ..ops import native
    from ..runtime.packed import packed_folder

    if args.clean:
        freed, packed = native.clean_cache(), packed_folder().clear()
        what = f"the built kernels ({size(freed)}) and packed models ({size(packed)})"
        sys.stderr.write(f"exl: removed {what}; they are made again when needed\n")
    if args.build:
        native.ensure_loaded()
        sys.stderr.write("exl: the native kernels are built and loaded\n")
    if args.clean and not args.build and not args.json:
        return 0
    folder = packed_folder()
    count = len(folder.models())
    detail = f"{folder.folder}: {count} model{'s' * (count != 1)}, {size(folder.nbytes())}"
    checks = [*native.doctor_checks(), native.check("packed models", True, detail)]
    if args.json:
        sys.stdout.write(json.dumps([asdict(check) for check in checks]) + "\n")
    else:
        _show(checks)
    return 1 if any(check.ok is False for check in checks) else 0


def _show(checks: "Sequence[Any]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        mark, style = MARKS[check.ok]
        table.add_row(Text(mark, style=style), Text(clean_line(check.name)), Text(clean_line(check.detail)))
        if check.advice and check.ok is not True:
            table.add_row("", "", Text(f"→ {clean_line(check.advice)}", style="yellow" if check.ok is False else "dim"))
    console.print(table)
