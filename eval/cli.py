"""The command line of the judge. Imports nothing heavy: `--help` must be instant.

Exit codes are those of `exl`, see `exl_runtime/console/program.py`.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from exl_runtime.console.program import StrictParser, run_program
from exl_runtime.console.progress import Reporter

COMMANDS = (
    "perplexity",
    "kld",
    "tasks",
    "compare",
    "cache",
    "recommend",
    "speed",
    "step",
    "kernels",
    "hardware",
    "make",
)
ALIASES = {"ppl": "perplexity", "task": "tasks"}
DESCRIPTION = "Measure quality and speed of EXL2, GPTQ and plain safetensors models, the protocol beside every number."
EXAMPLES = """\
examples:
  %(prog)s perplexity models/mine --data wikitext2 --protocol exl2
  %(prog)s kld models/mine --reference models/source
  %(prog)s compare models/a models/b --reference models/source -o report.html
  %(prog)s recommend models --vram 12GB --context 16384
  %(prog)s speed models/mine --prompt 512 --generate 128"""


def build_parser(prog: str = "python -m eval") -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = StrictParser(
        prog=prog, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(quiet=False, json=False, verbose=0)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        module = command(name)
        aliases = [short for short, long in ALIASES.items() if long == name]
        one = commands.add_parser(
            name,
            aliases=aliases,
            usage=f"{prog} {name} {module.USAGE}",
            help=module.HELP,
            description=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=getattr(module, "EPILOG", None),
        )
        module.add(one)
        _add_output(one)
    return parser


def command(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f".commands.{ALIASES.get(name, name)}", __package__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. See `run_program`."""
    return run_program(
        "eval", argv, build_parser, _run, interrupted=lambda: "interrupted before there was anything to show"
    )


def _run(args: argparse.Namespace, reporter: Reporter) -> int:
    if args.command is None:
        build_parser().print_help()
        return 0
    outcome = command(args.command).run(args, reporter)
    reporter.result(outcome.text, {"command": ALIASES.get(args.command, args.command), **outcome.facts})
    return outcome.code


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON event per line; the last one holds the figures")
    group.add_argument("--quiet", action="store_true", help="warnings and the result only")
    group.add_argument("-v", "--verbose", action="count", default=0, help="more on standard error; -vv: all of it")
