"""`eval compare`: several models and cache types on the same text, in one table and one page."""

import argparse
from pathlib import Path

from exl_runtime.console.progress import Progress

from ..data import add_data
from ..opening import CACHES, add_loading, cache_type, positive
from ..outcome import Outcome
from ..protocol import add_protocol
from ..reference import add_reference

HELP = "size, perplexity and divergence of several models in one table, and as a page with plots"
USAGE = "MODEL ... [--reference SOURCE] [--cache TYPE,...] [-o report.html] [options]"
LENGTH, ROWS = 512, 20  # with a reference: see `eval kld`
EPILOG = f"""\
Without --protocol: with --reference {ROWS} windows of {LENGTH} tokens side by side, as `eval kld`; without it the gptq
protocol, all of the text. With --reference, --rows is {ROWS} unless given, whatever the protocol. A model that cannot
be opened, or that has another tokenizer, is reported and left out. Exit code 2 when a model was left out, 130 after
Ctrl-C: then the table holds what there was.

example:
  python -m eval compare models/a-4.0bpw models/a-3.0bpw --reference models/a -o report.html"""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="local model folders, or `demo`, the bundled toy")
    parser.add_argument("--reference", metavar="SOURCE", help="folder of the model that they were made from")
    parser.add_argument(
        "--cache",
        type=cache_list,
        default=("auto",),
        metavar="TYPE,...",
        help=f"types of keys and values, each measured with each model: {', '.join(CACHES)} (default: auto)",
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens for the memory column (default: the model's)"
    )
    add_page(parser)
    add_data(parser)
    add_protocol(parser)
    parser.set_defaults(protocol=None)
    add_reference(parser)
    add_loading(parser, cache=False)


def run(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Compare. Raises ExlError for what concerns all models: the text, the reference, the page."""
    from ..compare import jobs_of
    from ..measuring import require_writable
    from ..measuring import run as measure

    require_writable(args.out)
    judged = args.reference is not None
    defaults = {"protocol": "gptq", "length": LENGTH if judged else None, "rows": ROWS if judged else None}
    jobs = jobs_of(args.models, args.cache)
    return measure("compare", args, jobs, progress, source=args.reference, defaults=defaults)


def add_page(parser: argparse.ArgumentParser) -> None:
    """-o and --no-noise-floor."""
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="also write a self-contained HTML page")
    parser.add_argument("--no-noise-floor", action="store_true", help="do not run the source in bf16 for comparison")


def cache_list(text: str) -> tuple[str, ...]:
    """ "fp16,q8" as an argument: known types, each once."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a cache type: use {', '.join(CACHES)}")
    return tuple(dict.fromkeys(cache_type(name) for name in names))
