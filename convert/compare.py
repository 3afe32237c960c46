"""`python -m convert.compare SOURCE RESULT ...`: how far models are from their source on a text, one line each.

The check behind the figures in LOG.md: float32, whole windows, nothing left out.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from exl_runtime.errors import ConvertError, ExlError

WINDOWS, LENGTH = 60, 512


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; the exit codes are those of `python -m convert`."""
    parser = argparse.ArgumentParser(prog="python -m convert.compare", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the unquantized model")
    parser.add_argument("results", type=Path, nargs="+", help="folders of the same model, in any format")
    parser.add_argument("--text", type=Path, required=True, help="a text file, or .jsonl with chats (see --chat)")
    parser.add_argument("--chat", action="store_true", help='every line of the file is {"messages": [...]}')
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of tokens, from the beginning")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a window")
    args = parser.parse_args(argv)
    try:
        _run(args)
    except ExlError as err:
        sys.stderr.write(f"convert.compare: {err}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    import torch

    from .resources import chunk_rows
    from .source import Source
    from .states import States
    from .verify import compare

    with Source.open(args.source) as source:
        ids = list(_ids(args, source))
        if len(ids) < args.length:
            raise ConvertError(f"{args.text}: {len(ids)} tokens, less than one window", hint="a longer text is needed")
        count = len(ids) // args.length
        rows = torch.tensor(ids[: count * args.length]).view(count, args.length)
        print(f"{args.text.name}: {count} windows of {args.length} tokens")
        print(f"{'bits':>7} {'KL mean':>9} {'median':>9} {'99 %':>9} {'top-1 %':>8} {'ppl':>9} {'source':>9}  folder")
        for folder in args.results:
            with Source.open(folder) as result:
                found = compare(
                    source, result, rows, chunk=chunk_rows(source.spec, args.length), text="", room=lambda s: States(s)
                )
            print(
                f"{_bits(folder):7.3f} {found.kl_mean:9.5f} {found.kl_median:9.5f} {found.kl_p99:9.5f} "
                f"{100 * found.top1:8.2f} {found.perplexity:9.4f} {found.source_perplexity:9.4f}  {folder.name}",
                flush=True,
            )


def _bits(folder: Path) -> float:
    from exl_runtime.model.summary import summarize

    return summarize(folder).bits_per_weight


def _ids(args: argparse.Namespace, source) -> Iterator[int]:
    from exl_runtime.tokenizer.template import ChatTemplate
    from exl_runtime.tokenizer.tokenizer import Tokenizer

    from .rows import token_stream

    wanted = args.windows * args.length
    tokenizer = Tokenizer.open(source.folder)
    if not args.chat:
        yield from token_stream([args.text], tokenizer, wanted).tolist()
        return
    template = ChatTemplate.open(source.folder, tokenizer)
    given = 0
    with open(args.text, encoding="utf-8") as lines:
        for line in lines:
            ids = template.encode(json.loads(line)["messages"], add_generation_prompt=False)[1]
            yield from ids[: wanted - given]
            given += len(ids)
            if given >= wanted:
                return


if __name__ == "__main__":
    sys.exit(main())
