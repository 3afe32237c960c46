"""`eval recommend`: variant, cache and context for the memory there is."""

import argparse
from pathlib import Path

from exl_runtime.console.progress import Progress
from exl_runtime.console.sizes import parse_size
from exl_runtime.errors import ExlError, UsageError

from ..opening import CACHES, positive
from ..outcome import Outcome
from .compare import cache_list

HELP = "which variant in a folder of models, with which cache, for a memory and a context, and why"
USAGE = "DIR [--vram 12GB] [--context N] [--cache TYPE,...] [--measurements FILE ...]"
CONTEXT = 8192


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder whose subfolders are variants of a model")
    group = parser.add_argument_group("what is wanted")
    group.add_argument(
        "--vram",
        type=_size,
        metavar="SIZE",
        help="memory for weights, cache and work: 12GB, 11.5GiB (default: what is free now on --device)",
    )
    group.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help=f"tokens that must fit (default: {CONTEXT}, or the model's own where that is less)",
    )
    group.add_argument(
        "--cache",
        type=cache_list,
        metavar="TYPE,...",
        help="types of keys and values to choose from (default: fp16 and the quantized ones)",
    )
    group.add_argument(
        "--measurements",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="saved output of `eval compare --json` or `eval cache --json`, or a page of theirs",
    )
    group.add_argument("--device", default="auto", help="whose free memory: auto, cpu, cuda or cuda:N (default: auto)")


def run(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Read the headers, choose, explain. Raises ExlError. Exit code 2 when no model fits."""
    from ..advice import advice_facts, advice_text
    from ..recommend import choose, default_caches, find_variants, group, with_measurements

    caches = args.cache or default_caches(CACHES)
    sets = _measurements(args.measurements)
    found, skipped = find_variants(args.folder)
    for folder, why in skipped:
        progress.warn(f"{folder.name} is not considered: {why}")
    budget = args.vram if args.vram is not None else _free(args.device)
    choices = []
    summaries = dict(found)
    with progress.stage("choosing", len(found), "variants") as stage:
        for plain in group(_bare(found)):
            mine = [(variant.folder, summaries[variant.folder]) for variant in plain]
            variants, why, allowance = with_measurements(mine, [*sets, *_reports(mine)])
            own = max(variant.summary.context_length for variant in variants)
            context = args.context or min(CONTEXT, own)
            try:
                choices.append(
                    choose(
                        variants,
                        caches,
                        budget=budget,
                        context=context,
                        memory=_memory(),
                        why=why,
                        allowance=allowance,
                    )
                )
            except ExlError as err:
                skipped += [(variant.folder, err.problem) for variant in variants]
                last = err
            stage.advance(len(variants))
    if not choices:
        raise last
    facts = advice_facts(choices, skipped)
    return Outcome(
        text=advice_text(choices, skipped),
        facts={"folder": str(args.folder), **facts},
        code=0 if any(choice.best for choice in choices) else 2,
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as err:
        raise argparse.ArgumentTypeError(f"{err.problem}; {err.hint}") from err


def _free(device: str) -> int:
    from exl_runtime.cache.geometry import free_memory
    from exl_runtime.model.placement import resolve_device

    return free_memory(resolve_device(device))


def _measurements(paths: list[Path]):
    from ..saved import merged, read_measurements

    return merged(read_measurements(path) for path in paths)


def _reports(found):
    from ..saved import merged, read_reports

    return merged(one for folder, _ in found for one in read_reports(folder))


def _bare(found):
    from ..recommend import Variant

    return [Variant(folder=folder, summary=summary, kl={}) for folder, summary in found]


def _memory():
    """The memory model of `exl info`; what it read once it remembers."""
    from functools import cache

    from exl_runtime.model.summary import summarize

    return cache(lambda folder, context, kind: summarize(folder, context, cache=kind).total_bytes)
