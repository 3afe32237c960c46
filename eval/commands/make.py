"""`python -m eval make`: a model with random weights."""

import argparse
from typing import TYPE_CHECKING

from exl_runtime.errors import UsageError

from ..opening import positive
from ..outcome import Outcome

if TYPE_CHECKING:
    from exl_runtime.console.progress import Progress

HELP = "write a model of a given shape with random weights, to measure speed with"
USAGE = "SHAPE -o DIR [--format exl2|gptq|fp16|bf16] [--bits 4.0] [--gguf FILE --gguf-type Q4_0] [options]"
EPILOG = """\
SHAPE is 1.1b, 7b or 8b, or HIDDEN/INNER/LAYERS/HEADS/KV_HEADS/VOCAB, for example 2048/5632/22/32/4/32000.
A mixture of experts in every layer: moe-1b, or .../VOCAB/EXPERTS/ACTIVE behind the others, INNER being that of one
expert: 1024/512/12/16/4/32000/32/8 is moe-1b, 32 experts of which every token visits 8.
examples:
  %(prog)s 1.1b -o models/made-4.0
  %(prog)s moe-1b -o models/made-moe
  %(prog)s 1.1b -o models/made-gptq --format gptq --bits 4 --group 128 --gguf models/twin.gguf"""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("shape", metavar="SHAPE", help="1.1b, 7b, 8b, moe-1b or numbers with slashes between")
    parser.add_argument("-o", "--output", metavar="DIR", help="the folder to write; must not exist or be empty")
    parser.add_argument("--format", default="exl2", choices=("exl2", "gptq", "fp16", "bf16"), help="default: exl2")
    parser.add_argument("--bits", type=float, default=4.0, help="per weight of the layers, EXL2 and GPTQ (default: 4)")
    parser.add_argument("--group", type=int, metavar="N", help="rows that share scales; -1: all, GPTQ (default: 128)")
    parser.add_argument("--act-order", action="store_true", help="GPTQ: rows belong to groups in a random order")
    parser.add_argument("--layers", type=positive, metavar="N", help="instead of the shape's own number")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other weights (default: 0)")
    parser.add_argument("--gguf", metavar="FILE", help="also, or only, a GGUF file of the same shape")
    parser.add_argument("--gguf-type", default="Q4_0", choices=("Q4_0", "Q4_K", "Q8_0", "F16"), help="default: Q4_0")


def run(args: argparse.Namespace, progress: "Progress") -> Outcome:
    """Write what was asked for. Raises UsageError, EvalError or StorageError."""
    from pathlib import Path

    from exl_runtime.model.summary import summarize

    from ..made.folder import Recipe, write_model
    from ..made.shape import parse_shape
    from ..made.twin import write_twin

    if not args.output and not args.gguf:
        raise UsageError("nothing to write", hint="give -o DIR, --gguf FILE or both")
    if args.seed < 0:
        raise UsageError(f"--seed is {args.seed}", hint="give 0 or more")
    shape = parse_shape(args.shape, layers=args.layers, mixtures=True)
    lines: list[str] = []
    facts: dict[str, object] = {}
    if args.output:
        folder = Path(args.output).expanduser()
        recipe = Recipe(format=args.format, bits=args.bits, group=args.group, act_order=args.act_order, seed=args.seed)
        write_model(folder, shape, recipe, progress)
        made = summarize(folder)
        lines.append(
            f"{folder}: {made.format}, {made.parameters / 1e6:.0f} million weights, {made.file_bytes / 1e6:.1f} MB, "
            f"{made.bits_per_weight:.3f} bits per weight in the layers"
        )
        facts |= {
            "model": str(folder),
            "format": made.format,
            "parameters": made.parameters,
            "bits_per_weight": made.bits_per_weight,
            "file_bytes": made.file_bytes,
        }
    if args.gguf:
        path = Path(args.gguf).expanduser()
        write_twin(path, shape, args.gguf_type, args.seed, progress)
        size = path.stat().st_size
        lines.append(f"{path}: {args.gguf_type}, {size / 1e6:.1f} MB")
        facts |= {"gguf": str(path), "gguf_type": args.gguf_type, "gguf_bytes": size}
    return Outcome(text="\n".join(lines), facts=facts)
