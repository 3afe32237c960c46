"""Command line options that several commands share. Imports nothing heavy: `--help` must be instant."""

import argparse
import gc
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..chat.settings import parse
from ..console.terminal import clean_message, user_text
from ..sampling.params import SamplingParams

if TYPE_CHECKING:
    from ..runtime import Runtime

OVERFLOWS = ("error", "drop", "window")
NOT_HERE = ("logprobs",)  # sampling parameters that are not about choosing; commands decide on them
SHORT = {"temperature": ("-t",), "seed": ("-s",)}


def add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The MODEL argument."""
    what = "a local model folder, or `demo`, the bundled toy"
    if optional:
        parser.add_argument("model", metavar="MODEL", nargs="?", default="demo", help=f"{what} (default)")
    else:
        parser.add_argument("model", metavar="MODEL", help=what)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Options about opening a model."""
    group = parser.add_argument_group("opening the model")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "cpu", "cuda", "reference"),
        help="whose kernels run; reference is plain torch (default: auto)",
    )
    group.add_argument(
        "--context", type=length_or_auto, default="auto", metavar="N", help="tokens of the longest conversation (auto)"
    )
    group.add_argument(
        "--cache", default="auto", choices=("auto", "fp32", "fp16", "bf16"), help="type of keys and values (auto)"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one per core)")
    group.add_argument("--template", metavar="FILE", help="chat template to use instead of the model's own")


def add_reply(parser: argparse.ArgumentParser, *, overflow: str, max_tokens: int | None, shown: str) -> None:
    """Options about replies and their length."""
    group = parser.add_argument_group("the reply")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument(
        "-n", "--max-tokens", type=positive, metavar="N", default=max_tokens, help=f"most tokens of a reply ({shown})"
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the reply before this text; repeatable")
    group.add_argument(
        "--overflow",
        choices=OVERFLOWS,
        default=overflow,
        help=f"a full context: refuse, drop the oldest turns, or slide a window (default: {overflow})",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """One option per sampling parameter; `chosen_sampling` reads them back."""
    group = parser.add_argument_group("choosing tokens", "lists are separated by commas; temperature 0 is greedy")
    kinds = sampling_kinds()
    for entry in fields(SamplingParams):
        if entry.name in NOT_HERE:
            continue
        flags = (*SHORT.get(entry.name, ()), "--" + entry.name.replace("_", "-"))
        if kinds[entry.name] is bool:
            group.add_argument(*flags, dest=dest(entry.name), action="store_const", const="true")
            continue
        default = SamplingParams.__dataclass_fields__[entry.name].default
        plain = isinstance(default, int | float) and not isinstance(default, bool)
        group.add_argument(
            *flags,
            dest=dest(entry.name),
            metavar=metavar(kinds[entry.name]),
            help=f"default: {default:g}" if plain else None,
        )


def sampling_kinds() -> dict[str, Any]:
    """The annotated type of every sampling parameter."""
    from typing import get_type_hints

    return get_type_hints(SamplingParams)


def dest(name: str) -> str:
    """The attribute of a sampling parameter in the parsed arguments."""
    return f"sampling_{name}"


def metavar(kind: Any) -> str:
    """A word for the help text."""
    text = str(kind)
    if "Mapping" in text:
        return "ID=X,.."
    if "tuple[int" in text:
        return "ID,.."
    if "tuple[str" in text:
        return "NAME,.."
    return "X" if kind is float else "N"


def chosen_sampling(args: argparse.Namespace, *, logprobs: int = 0) -> SamplingParams:
    """The parameters that were given, over the defaults. Raises UsageError naming the one that is wrong."""
    return SamplingParams(logprobs=logprobs, **given_sampling(args))


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> value of the parameters that were given. Raises UsageError for what cannot be read as its type."""
    kinds = sampling_kinds()
    return {
        name: parse(name, kinds[name], user_text(text))
        for name in kinds
        if name not in NOT_HERE and (text := getattr(args, dest(name), None)) is not None
    }


def stop_texts(args: argparse.Namespace) -> tuple[str, ...]:
    """The texts of --stop, with \\n and \\t understood."""
    return tuple(user_text(text).replace("\\n", "\n").replace("\\t", "\t") for text in args.stop or ())


def open_runtime(args: argparse.Namespace) -> "Runtime":
    """Load the model the arguments name; progress of a long start goes to standard error."""
    from ..runtime import load
    from .progress import Progress

    with Progress(quiet=args.verbose < 2) as progress:
        runtime = load(
            args.model,
            device=args.device,
            backend=args.backend,
            context=args.context,
            cache=args.cache,
            threads=args.threads,
            template=args.template,
            progress=progress,
        )
    # What exists by now stays to the end; from here on garbage is collected, among what comes later only.
    gc.freeze()
    gc.enable()
    return runtime


def positive(text: str) -> int:
    """A whole number from 1 up."""
    try:
        number = int(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{clean_message(text)!r} is not a whole number") from err
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def length_or_auto(text: str) -> int | str:
    """`auto`, or a number of tokens; 8k means 8192."""
    if text == "auto":
        return text
    if text[-1:] in "kK" and text[:-1].isdigit():
        return positive(text[:-1]) * 1024
    return positive(text)


def add_output(parser: argparse.ArgumentParser, *, verbose: bool = True) -> None:
    """-v, on every command."""
    if verbose:
        parser.add_argument("-v", "--verbose", action="count", default=0, help="more on standard error; -vv: all of it")
