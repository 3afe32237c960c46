"""What `python -m convert` and `exl convert` take on their command line. Imports nothing heavy: `--help` is instant."""

import argparse
from pathlib import Path

from exl_runtime.console.program import StrictParser
from exl_runtime.console.progress import printable
from exl_runtime.console.sizes import parse_size
from exl_runtime.errors import UsageError

from .options import CACHES, ENCODERS

DESCRIPTION = """\
Make an EXL2 model out of a folder with an fp16, bf16, fp32, GPTQ or EXL2 one, on the CPU or a GPU. The work is saved
as it goes: the same command again, or --resume, goes on where it stopped."""
EXAMPLES = """\
examples:
  %(prog)s -i models/source -o models/source-4.0bpw -b 4.0
  %(prog)s -i models/source -o models/for-my-card --target-vram 12GB --context 8192 --cache q8
  %(prog)s -i models/source -o models/source-3.0bpw -b 3.0 --calibration prose.txt code.jsonl
  %(prog)s -i models/source --measure-only --work models/source.measured
  %(prog)s --resume models/source-4.0bpw.work
  %(prog)s --batch list.toml

a batch file, whose keys are the options:
  [defaults]
  calibration = ["prose.txt"]
  [[job]]
  in = "models/source"
  out = "models/source-{bits}bpw"
  bits = [3.0, 4.0, 5.0]
jobs of one source measure it once; what is finished is passed over; a job that fails does not stop the others.

sizes: GB and MB are powers of 1000; GiB, MiB, G and M powers of 1024."""


def build_parser(prog: str = "python -m convert") -> argparse.ArgumentParser:
    """All options. Those of a job are absent from the result unless given; their dests are fields of JobOptions."""
    parser = StrictParser(
        prog=prog,
        usage=f"{prog} -i SOURCE -o RESULT -b BITS [options]\n       {prog} --resume DIR\n       {prog} --batch FILE",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("the job")
    group.add_argument("-i", "--in", dest="source", type=_path, metavar="DIR", help="folder of the model")
    group.add_argument("-o", "--out", type=_path, metavar="DIR", help="folder to be made; must not exist, or be empty")
    group.add_argument("--work", type=_path, metavar="DIR", help="folder of the checkpoints (default: RESULT.work)")
    group.add_argument("--resume", type=_path, metavar="DIR", help="go on with the job in this work folder")
    group.add_argument("--batch", type=_path, metavar="FILE", help="many jobs out of a TOML file, see below")

    group = parser.add_argument_group("size and quality")
    group.add_argument(
        "-b", "--bits", type=float, metavar="B", help="average bits per weight of the layers as stored, such as 4.0"
    )
    group.add_argument("--head-bits", type=int, metavar="B", help="of the output head: 2, 3, 4, 5, 6 or 8 (default: 6)")
    group.add_argument(
        "--target-vram",
        type=_size,
        metavar="SIZE",
        help="instead of -b: what weights, cache and work may take in all",
    )
    group.add_argument(
        "--context", type=_tokens, metavar="N", help="with --target-vram: tokens of the cache (default: 8192)"
    )
    group.add_argument(
        "--cache",
        metavar="TYPE",
        help=f"with --target-vram: type of keys and values, {', '.join(CACHES)} or another kXvY (default: fp16)",
    )
    group.add_argument(
        "--encoder",
        choices=ENCODERS,
        help="best; or classic, the algorithm of exllamav2, to compare with (default: best)",
    )

    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        nargs="+",
        type=_path,
        metavar="FILE",
        help="text: txt, jsonl, json or parquet (default: text that the model writes itself)",
    )
    group.add_argument("--rows", type=int, metavar="N", help="rows of calibration data, at least 4")
    group.add_argument("--length", type=int, metavar="L", help="tokens of a row, 32 to 65536")
    group.add_argument("--measurement", type=_path, metavar="FILE", help="measurement.json of an earlier job, reused")
    group.add_argument("--measure-only", action="store_true", help="end with the measurement; needs neither -o nor -b")

    group = parser.add_argument_group("how")
    group.add_argument(
        "--shard-size",
        dest="shard_mb",
        type=int,
        metavar="MB",
        help="most MiB of a weight file; 0: one file (8192)",
    )
    group.add_argument("--seed", type=int, metavar="S", help="the same seed makes the same files (default: 0)")
    group.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one per core)")

    group = parser.add_argument_group("output").add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", default=False, help="warnings and the result only")
    group.add_argument(
        "--json", action="store_true", default=False, help="one JSON event per line on standard output, for scripts"
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="more on standard error; where errors arose")
    return parser


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def _tokens(text: str) -> int:
    """A number of tokens; 8k means 8192."""
    try:
        return int(text[:-1]) * 1024 if text[-1:] in "kK" else int(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is not a whole number") from err


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as err:
        raise argparse.ArgumentTypeError(f"{err.problem}; {err.hint}") from err
