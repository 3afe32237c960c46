"""From the arguments of a command to an opened model. Imports nothing heavy at the top."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from exl_runtime.cache.names import CHOICES, check_name
from exl_runtime.console.progress import Progress
from exl_runtime.errors import UsageError

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime

CACHES = ("auto", "fp32", "fp16", "bf16", "q8", "q6", "q4")  # kXvY as well, see `cache_type`


def add_model(parser: argparse.ArgumentParser) -> None:
    """The MODEL argument."""
    parser.add_argument("model", metavar="MODEL", help="a local model folder, or `demo`, the bundled toy")


def add_loading(
    parser: argparse.ArgumentParser, *, cache: bool = True, threads: Callable[[str], object] | None = None
) -> None:
    """Options about opening a model, the names and meanings of `exl chat`.

    cache    False: without --cache, for commands that open a model with several types
    threads  reads --threads instead of `positive`, for commands that run with several numbers of them
    """
    group = parser.add_argument_group("opening the model")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "cpu", "cuda", "reference"),
        help="whose kernels run; reference is plain torch (default: auto)",
    )
    if cache:
        group.add_argument(
            "--cache",
            default="auto",
            type=cache_type,
            metavar="TYPE",
            help=f"type of keys and values: {CHOICES} (default: auto)",
        )
    group.add_argument(
        "--accuracy",
        choices=("exact", "fast"),
        default="exact",
        help="fast: prompts with 8-bit inputs on the CPU (default: exact)",
    )
    group.add_argument("--threads", type=threads or positive, metavar="N", help="CPU threads (default: one per core)")


def open_model(
    model: str | Path,
    args: argparse.Namespace,
    progress: Progress,
    *,
    context: int | str = "auto",
    cache: str | None = None,
    dtype: str = "auto",
) -> "AbstractContextManager[Runtime]":
    """Open `model` as the options of `add_loading` in `args` say; `cache` stands above theirs. Raises ExlError.

    Use as a context manager, so that the memory is free for the next model.
    """
    from exl_runtime.runtime import load

    progress.say(f"opening {model}")
    return load(
        model,
        device=args.device,
        backend=args.backend,
        context=context,
        cache=cache or args.cache,
        dtype=dtype,
        accuracy=args.accuracy if dtype == "auto" else "exact",  # whoever asks for a type is the measure of others
        threads=args.threads,
    )


def cache_type(text: str) -> str:
    """`auto`, or the name of a type of keys and values, as an argument."""
    if text == "auto":
        return text
    try:
        return check_name(text)
    except UsageError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a cache type: use auto, {CHOICES}") from None


def positive(text: str) -> int:
    """A whole number from 1 up, as an argument."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return number
