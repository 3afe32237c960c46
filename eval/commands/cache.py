"""`eval cache`: what each type of keys and values costs in quality, and what it saves."""

import argparse

from exl_runtime.console.progress import Progress

from ..data import add_data
from ..opening import CACHES, add_loading, add_model
from ..outcome import Outcome
from ..protocol import add_protocol
from ..reference import add_reference
from .compare import add_page, cache_list

HELP = "perplexity and divergence of a model with each type of key/value cache, in one table"
USAGE = "MODEL [--types fp32,fp16,...] [--reference SOURCE] [-o report.html] [options]"
LENGTH, ROWS = 2048, 8
EPILOG = f"""\
Divergence is from the same model with the fp32 cache, or from SOURCE. Without --protocol: {ROWS} windows of {LENGTH}
tokens side by side (less where the model was made for less): long enough that most of what a token sees comes out of
the cache. Whatever the protocol, --rows is {ROWS} unless given.

example:
  python -m eval cache models/mine --types fp16,q8,q4"""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    known = tuple(name for name in CACHES if name != "auto")
    add_model(parser)
    parser.add_argument(
        "--types", type=cache_list, default=known, metavar="TYPE,...", help=f"default: {','.join(known)}"
    )
    parser.add_argument("--reference", metavar="SOURCE", help="folder of the model that MODEL was made from")
    add_page(parser)
    add_data(parser)
    add_protocol(parser)
    parser.set_defaults(protocol=None, context=None)
    add_reference(parser)
    add_loading(parser, cache=False)


def run(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Compare the types. Raises ExlError."""
    from ..compare import jobs_of
    from ..measuring import require_writable
    from ..measuring import run as measure

    require_writable(args.out)
    own = args.reference is None
    return measure(
        "cache",
        args,
        jobs_of([args.model], args.types),
        progress,
        source=args.model if own else args.reference,
        defaults={"protocol": "gptq", "length": LENGTH, "rows": ROWS},
        own=own,
    )
