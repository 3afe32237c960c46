"""`python -m eval kernels`: times of single operations at the shapes of real models."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..opening import cache_type, positive
from ..outcome import Outcome

if TYPE_CHECKING:
    from exl_runtime.console.progress import Progress

HELP = "time of every operation at real layer shapes, with cold caches, against torch and against memory"
USAGE = "[--shapes 1.1b] [--format exl2,gptq,dense] [--bits 4] [--m 1,2,4,8,32,512] [--threads N[,N...]] [options]"
EPILOG = """\
Calls go round enough copies of the weights to exceed the last-level cache. The floor is the time in which the bytes of
one call pass at the read bandwidth measured just before, on a GPU that of copying. torch multiplies the dequantized
matrix; `dequantized` is the time of doing that and multiplying by the library, on a GPU."""
KINDS = ("linear", "attention", "small")


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--shapes", default="1.1b", metavar="SHAPE", help="1.1b, 7b, 8b, or as `make` takes them")
    parser.add_argument("--format", default="exl2,gptq,dense", metavar="LIST", help="default: exl2,gptq,dense")
    parser.add_argument(
        "--bits", type=_list(_number), default=(4.0,), metavar="LIST", help="widths; 4.1, say, mixes (default: 4)"
    )
    parser.add_argument(
        "--m", type=_list(positive), default=(1, 2, 4, 8, 32, 512), metavar="LIST", help="default: 1,2,4,8,32,512"
    )
    parser.add_argument(
        "--contexts",
        type=_list(positive),
        metavar="LIST",
        help="keys of attention (default: 512,2048,8192; on a GPU 2048,32768)",
    )
    parser.add_argument(
        "--caches",
        type=_list(cache_type),
        metavar="LIST",
        help="types of keys and values (default: auto,fp16; on a GPU fp16,q8,q4)",
    )
    parser.add_argument(
        "--ops", default=",".join(KINDS), metavar="LIST", help=f"some of {', '.join(KINDS)} (default: all)"
    )
    parser.add_argument("--runs", type=positive, default=7, metavar="N", help="samples of each (default: 7)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "cpu", "cuda", "reference"), help="whose kernels (default: auto)"
    )
    parser.add_argument("--threads", type=_list(positive), default=(None,), metavar="N[,N...]", help="CPU threads")


def run(args: argparse.Namespace, progress: "Progress") -> Outcome:
    """Measure and tell. Raises ExlError."""
    import torch

    from exl_runtime.errors import UsageError
    from exl_runtime.model.placement import resolve_cache, resolve_device
    from exl_runtime.ops import native

    from ..made.shape import parse_shape
    from ..speed import kernels
    from ..speed.bandwidth import Bandwidth, llc_bytes
    from ..speed.cases import Where, stored_as
    from ..speed.timers import timer_for

    kinds = args.ops.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"--ops: unknown {unknown[0]!r}", hint=f"give some of {', '.join(KINDS)}")
    shape = parse_shape(args.shapes)
    stored = stored_as(args.format.split(","), args.bits)
    device = resolve_device(args.device)
    backend = native.resolve_backend(None if args.backend == "auto" else args.backend, device)
    where = Where(device=device, backend=backend, cache_bytes=llc_bytes(device))
    caches = kernels.usual_caches(device)
    if args.caches is not None:
        caches = tuple(dict.fromkeys(resolve_cache(name, device) for name in args.caches))
    what = (shape, stored, args.m, args.contexts or kernels.usual_contexts(device), kinds, caches)
    total = kernels.count_cases(*what) * len(args.threads)
    bandwidth = Bandwidth(device)
    with progress.stage("measuring", total, "operations") as steps:
        found = kernels.bench(
            lambda: kernels.all_cases(*what, where),
            args.threads,
            set_threads=native.set_threads,
            timer=timer_for(device),
            bandwidth=bandwidth.measure,
            runs=args.runs,
            advance=lambda note: steps.advance(1, note),
        )
    if not found.rows:
        raise KeyboardInterrupt
    heading = (
        f"shapes {args.shapes} on {device}, backend {backend}, torch {torch.__version__}, last-level cache "
        f"{where.cache_bytes / 2**20:.0f} MiB",
    )
    facts = {"shapes": args.shapes, "device": str(device), "backend": backend, **kernels.facts_of(found)}
    return Outcome(text=kernels.text_of(found, heading), facts=facts, code=130 if found.partial else 0)


def _list(one: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    """ "1,2,4" as an argument, every part read by `one`."""
    return lambda text: tuple(one(part) for part in text.split(","))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
