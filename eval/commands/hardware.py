"""`python -m eval hardware`: everything that only a card can tell, and the table of targets."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from exl_runtime.errors import UsageError

from ..opening import positive
from ..outcome import Outcome

if TYPE_CHECKING:
    import torch

    from exl_runtime.console.progress import Progress

    from ..hardware.targets import Card

HELP = "run the tests and all measurements on this machine's GPU, and fill the table of targets"
USAGE = "--out DIR [--large 7b] [--small 1.1b] [--only NAME[,NAME...]] [--again] [options]"
EPILOG = """\
Stages run in processes of their own; DIR/NAME.json holds the figures of each. Started again, the command goes on with
the stages that have none yet. DIR/hardware.md is the table, DIR/hardware.json all of it. Takes about half an hour and
20 GB of disk (models with random weights, below DIR/models). exllamav2 and transformers are measured if they are
installed, compute-sanitizer is run if it is on PATH."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--out", required=True, metavar="DIR", help="figures, models and the table go there")
    parser.add_argument("--large", default="7b", metavar="SHAPE", help="of the larger model (default: 7b)")
    parser.add_argument("--small", default="1.1b", metavar="SHAPE", help="of the smaller one (default: 1.1b)")
    parser.add_argument("--only", metavar="LIST", help="these stages; the others keep what they gave before")
    parser.add_argument("--again", action="store_true", help="run stages again that have given figures before")
    parser.add_argument(
        "--limit", type=positive, default=1800, metavar="S", help="seconds for each stage (default: 1800)"
    )
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: cuda)")


def run(args: argparse.Namespace, progress: "Progress") -> Outcome:
    """Measure and tell. Raises ExlError."""
    from exl_runtime.files import naming, write_bytes, write_json
    from exl_runtime.model.placement import resolve_device
    from exl_runtime.ops import native

    from ..hardware import running
    from ..hardware.report import facts_of, markdown
    from ..hardware.stages import stages
    from ..hardware.targets import rows_of
    from ..made.shape import parse_shape

    for shape in (args.large, args.small):
        parse_shape(shape)
    device = resolve_device(args.device)
    if device.type != "cuda":
        raise UsageError(f"--device {args.device} is no GPU", hint="give cuda or cuda:N")
    native.resolve_backend("cuda", device)  # refuses with the reason
    card = card_of(device)
    out = Path(args.out).expanduser().resolve()
    with naming(out):
        (out / "models").mkdir(parents=True, exist_ok=True)
    tests = Path(__file__).resolve().parents[2] / "tests"
    what = stages(out, device=args.device, large=args.large, small=args.small, tests=tests if tests.is_dir() else None)
    chosen = {stage.name for stage in what} if args.only is None else set(args.only.split(","))
    if unknown := chosen - {stage.name for stage in what}:
        raise UsageError(
            f"--only: there is no stage {sorted(unknown)[0]!r}", hint=", ".join(stage.name for stage in what)
        )
    found: dict[str, running.Result] = {}
    with progress.stage("measuring", len(chosen), "stages") as steps:
        for stage in what:
            if stage.name in chosen:
                again = args.again and not stage.name.startswith("make-")
                progress.say(f"running {stage.name}")
                found[stage.name] = running.run_stage(stage, out, found, limit=args.limit, again=again)
                steps.advance(1, f"{stage.name}: {found[stage.name].why or 'done'}")
            elif (earlier := running.known(out, stage)) is not None:
                found[stage.name] = earlier
    rows = rows_of(found, card)
    text = markdown(rows, card, found)
    write_json(out / "hardware.json", facts_of(rows, card, found))
    write_bytes(out / "hardware.md", text.encode())
    return Outcome(text=f"{text}\nwritten to {out / 'hardware.md'}", facts=facts_of(rows, card, found))


def card_of(device: "torch.device") -> "Card":
    """The card and what is around it."""
    import os

    import torch

    from ..hardware.targets import Card

    facts = torch.cuda.get_device_properties(device)
    return Card(
        name=facts.name,
        capability=(facts.major, facts.minor),
        memory=facts.total_memory,
        torch=torch.__version__,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
