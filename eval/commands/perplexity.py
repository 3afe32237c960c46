"""`perplexity`: of one model on one text."""

import argparse
from typing import TYPE_CHECKING

from exl_runtime.console.progress import Progress

from ..data import add_data, chosen_data
from ..opening import add_loading, add_model, open_model
from ..outcome import Outcome
from ..protocol import add_protocol, chosen_protocol, conditions, count_windows, fitted, windows

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime

    from ..perplexity import Perplexity

HELP = "perplexity on WikiText-2, C4 or your own text, by the protocols that published numbers come from"
USAGE = "MODEL [--data NAME|FILE...] [--protocol NAME] [options]"
EPILOG = """\
protocols:
  gptq      2048 tokens side by side, all scored but the first; the rows of the data set joined by blank lines
  exl2      2048 tokens every 512, the first 20 windows, all scored but the first: the graphs of exllamav3
  llamacpp  512 tokens side by side of the raw file, BOS first, the second half scored: its perplexity tool
  stride    2048 tokens every 512, each token scored once: Hugging Face, and exllamav2 -sp wiki2
Numbers of different protocols, data or tokenizers must not be compared. Where the model was made for less context,
windows are as long as that, and a warning says so."""


def add(parser: argparse.ArgumentParser) -> None:
    """See the package."""
    add_model(parser)
    add_data(parser)
    add_protocol(parser)
    add_loading(parser)


def run(args: argparse.Namespace, progress: Progress) -> Outcome:
    """See the package. Raises ExlError."""
    protocol = fitted(chosen_protocol(args), args.model, progress, explicit=args.length is not None)
    data = chosen_data(args, progress)
    with open_model(args.model, args, progress, context=protocol.length) as runtime:
        from ..perplexity import measure

        total = count_windows(protocol, data, runtime.tokenizer)
        with progress.stage("perplexity", total, "windows") as stage:
            result = measure(runtime, windows(protocol, data, runtime.tokenizer), stage.advance)
        line = f"{protocol.describe(data, runtime.tokenizer)}; {conditions(runtime)}"
        return Outcome(
            text=_text(runtime, result, total, line),
            facts={
                "model": runtime.info.name,
                "format": runtime.info.format,
                "bits_per_weight": runtime.info.bits_per_weight,
                "cache": runtime.info.cache,
                "perplexity": result.perplexity,
                "perplexity_stderr": result.perplexity * result.stderr,
                "nll": result.nll,
                "nll_stderr": result.stderr,
                "tokens": result.tokens,
                "processed": result.processed,
                "windows": result.windows,
                "windows_total": total,
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
                "partial": result.partial,
                "data": data.name,
                "sha256": data.sha256,
                "protocol": line,
            },
            code=130 if result.partial else 0,
        )


def _text(runtime: "Runtime", result: "Perplexity", total: int, line: str) -> str:
    info = runtime.info
    several = result.windows > 1
    spread = f" ± {result.perplexity * result.stderr:.4f}" if several else ""
    spread_nll = f" ± {result.stderr:.5f} (standard error over windows)" if several else ""
    partial = f"  PARTIAL: stopped after {result.windows} of {total} windows" if result.partial else ""
    return "\n".join(
        (
            f"{info.name} ({info.format}, {info.bits_per_weight:.2f} bits per weight): "
            f"perplexity {result.perplexity:.4f}{spread}{partial}",
            f"  NLL {result.nll:.5f}{spread_nll} nats per token; {result.tokens} tokens scored in {result.windows} "
            f"windows, {result.seconds:.1f} s, {result.tokens_per_second:.0f} tokens/s",
            f"  protocol {line}",
        )
    )
