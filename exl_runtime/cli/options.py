"""Command line options that several commands share. Imports nothing heavy: `--help` must be instant."""

import argparse
import gc
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache.names import CHOICES, check_name
from ..chat.settings import parse
from ..console.terminal import clean_message, user_text
from ..errors import UsageError
from ..sampling.params import SamplingParams
from ..tokenizer.template_args import name_and_value

if TYPE_CHECKING:
    from ..runtime import Runtime

OVERFLOWS = ("error", "drop", "window")
SPECULATE = ("auto", "ngram", "draft", "off")
NOT_HERE = ("logprobs",)  # sampling parameters that are not about choosing; commands decide on them
GUIDANCE = 1.5  # where a negative prompt is given and no number
UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}  # bits to shift by
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
        "--cache",
        type=cache_or_auto,
        default="auto",
        metavar="TYPE",
        help=f"type of keys and values: {CHOICES} (default: auto)",
    )
    group.add_argument(
        "--accuracy",
        choices=("exact", "fast"),
        default="exact",
        help="fast: prompts with 8-bit inputs on the CPU, a little off (default: exact)",
    )
    group.add_argument(
        "--no-packed-cache",
        dest="packed_cache",
        action="store_false",
        help="neither start from what an earlier start packed for the CPU kernels, nor keep it on disk",
    )
    group.add_argument(
        "--lora",
        action="append",
        metavar="FOLDER[=WEIGHT]",
        type=lora,
        help="a LoRA adapter on top of the model, with weight 1 unless said; repeatable",
    )
    group.add_argument(
        "--step-tokens",
        type=positive,
        metavar="N",
        default=512,
        help="most tokens of one pass: fewer let replies go on more smoothly beside a long prompt (default: 512)",
    )
    group.add_argument(
        "--host-cache",
        type=bytes_or_auto,
        default="auto",
        metavar="SIZE",
        help="host memory for what leaves a GPU's cache, as in 8G or 512M; 0: none (default: auto, a quarter of what "
        "is free beside a GPU)",
    )
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one per core)")
    group.add_argument(
        "--gpu-split",
        metavar="SPLIT",
        help="spread the model over several GPUs, and over the CPU where they are full: auto, or GiB for each GPU in "
        "order, as in 20,24 (default: one device)",
    )
    group.add_argument(
        "--draft", metavar="FOLDER", help="a smaller model with the same tokens guesses ahead: faster, the same text"
    )
    group.add_argument(
        "--speculate",
        choices=SPECULATE,
        default="auto",
        help="guess tokens ahead from the text so far, with the draft model, or not at all; the text stays the same "
        "(default: auto, whatever there is)",
    )
    group.add_argument("--template", metavar="FILE", help="chat template to use instead of the model's own")
    group.add_argument(
        "--template-arg",
        action="append",
        metavar="NAME=VALUE",
        help="a variable of the chat template, as in enable_thinking=false; VALUE is JSON, or else text; repeatable",
    )


def add_reply(parser: argparse.ArgumentParser, *, overflow: str, max_tokens: int | None, shown: str) -> None:
    """Options about replies and their length."""
    group = parser.add_argument_group("the reply")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument(
        "-n", "--max-tokens", type=positive, metavar="N", default=max_tokens, help=f"most tokens of a reply ({shown})"
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the reply before this text; repeatable")
    group.add_argument(
        "--stop-id", action="append", type=token_id, metavar="ID", help="end it with this token; repeatable"
    )
    group.add_argument(
        "--stop-loop",
        type=loop,
        metavar="N,TIMES",
        help="end the reply when up to N tokens have come TIMES times in a row; say 32,4",
    )
    group.add_argument(
        "--overflow",
        choices=OVERFLOWS,
        default=overflow,
        help=f"a full context: refuse, drop the oldest turns, or slide a window (default: {overflow})",
    )


def add_sampling(parser: argparse.ArgumentParser, *, temperature: str | None = None) -> None:
    """One option per sampling parameter; `chosen_sampling` reads them back. `temperature`: help where it differs."""
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
        usual = f"default: {default:g}" if plain else None
        group.add_argument(
            *flags,
            dest=dest(entry.name),
            metavar=metavar(kinds[entry.name]),
            help=temperature if temperature and entry.name == "temperature" else usual,
        )


def add_constraints(parser: argparse.ArgumentParser, *, chat: bool = False) -> None:
    """Options about what a reply has to look like; `chosen_constraints` reads them back. chat: of every reply."""
    group = parser.add_argument_group("what the reply looks like", "grammars need the package llguidance")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--json-schema", metavar="FILE", help="JSON that is valid under this JSON Schema")
    one.add_argument("--regex", metavar="PATTERN", help="text that matches all of this regular expression")
    one.add_argument("--grammar", metavar="FILE", help="text of this grammar (Lark's EBNF)")
    one.add_argument("--choice", action="append", metavar="TEXT", help="one of these texts; repeatable")
    group.add_argument("--ban", action="append", metavar="TEXT", help="text that must not appear; repeatable")
    far = f"1 not at all (default: {GUIDANCE:g})"
    if chat:
        group.add_argument(
            "--negative-prompt",
            metavar="TEXT",
            help="lead replies away from what they would be under this system prompt",
        )
        group.add_argument("--guidance", type=float, metavar="X", help="how far away; 1 not at all (default: 1)")
        return
    group.add_argument("--prefix", default="", metavar="TEXT", help="the reply begins with this text")
    group.add_argument("--heal", action="store_true", help="the prompt may end within a word (for --raw)")
    group.add_argument("--negative-prompt", metavar="TEXT", help="lead the reply away from what follows this prompt")
    group.add_argument("--guidance", type=float, metavar="X", help=f"how far away; {far}")


def chosen_constraints(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Runtime.stream` that the options stand for. Raises UsageError for files and bad grammars."""
    return {
        **chosen_shape(args),
        "prefix": user_text(args.prefix),
        "heal": args.heal,
        "stop_loop": args.stop_loop,
        "stop_ids": args.stop_id,
    }


def chosen_shape(args: argparse.Namespace) -> dict[str, Any]:
    """Those of them that every reply of a chat has, too: `grammar` and `banned_strings`."""
    from ..generation.grammar import Grammar

    grammar = None
    if args.json_schema is not None:
        grammar = Grammar.json_schema(text_of_file(args.json_schema))
    elif args.regex is not None:
        grammar = Grammar.regex(user_text(args.regex))
    elif args.grammar is not None:
        grammar = Grammar.lark(text_of_file(args.grammar))
    elif args.choice is not None:
        grammar = Grammar.choice([user_text(text) for text in args.choice])
    return {"grammar": grammar, "banned_strings": tuple(user_text(text) for text in args.ban or ())}


def text_of_file(name: str) -> str:
    """A small file of text. Raises UsageError."""
    try:
        return Path(name).expanduser().read_text("utf-8")
    except (OSError, ValueError) as err:
        raise UsageError(f"cannot read {name}: {getattr(err, 'strerror', None) or 'it is no UTF-8 text'}") from err


def loop(text: str) -> tuple[int, int]:
    """`N,TIMES` of --stop-loop."""
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{clean_message(text)!r} is not N,TIMES")
    longest, times = (positive(part) for part in parts)
    if times < 2:
        raise argparse.ArgumentTypeError("TIMES is at least 2")
    return longest, times


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


def template_args(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> value of --template-arg; of one name the last. Raises UsageError."""
    return dict(name_and_value(user_text(text)) for text in args.template_arg or ())


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
            accuracy=args.accuracy,
            gpu_split=args.gpu_split,
            threads=args.threads,
            packed_cache=args.packed_cache,
            host_cache=args.host_cache,
            template=args.template,
            draft=args.draft,
            speculate=args.speculate,
            step_tokens=args.step_tokens,
            progress=progress,
        )
        if args.lora:
            try:
                runtime.set_lora({runtime.load_lora(folder): weight for folder, weight in args.lora})
            except BaseException:
                runtime.close()
                raise
    # What exists by now stays to the end; from here on garbage is collected, among what comes later only.
    gc.freeze()
    gc.enable()
    return runtime


def lora(text: str) -> tuple[str, float]:
    """`FOLDER[=WEIGHT]` of --lora."""
    folder, sign, number = text.rpartition("=")
    try:
        return (folder, float(number)) if sign and folder else (text, 1.0)
    except ValueError:
        return text, 1.0  # a folder with = in its name


def positive(text: str) -> int:
    """A whole number from 1 up."""
    try:
        number = int(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{clean_message(text)!r} is not a whole number") from err
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def token_id(text: str) -> int:
    """A whole number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{clean_message(text)!r} is not a token id")
    return int(text)


def length_or_auto(text: str) -> int | str:
    """`auto`, or a number of tokens; 8k means 8192."""
    if text == "auto":
        return text
    if text[-1:] in "kK" and text[:-1].isdigit():
        return positive(text[:-1]) * 1024
    return positive(text)


def bytes_or_auto(text: str) -> int | str:
    """`auto`, or a number of bytes; 8G is 8 GiB, and K, M and T go with it."""
    if text == "auto":
        return text
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS else (text, "")
    if not digits.isascii() or not digits.isdigit():
        raise argparse.ArgumentTypeError(f"{clean_message(text)!r} is no size: use auto, 0, or as in 8G or 512M")
    return int(digits) << UNITS.get(unit, 0)


def cache_or_auto(text: str) -> str:
    """`auto`, or the name of a cache type."""
    if text == "auto":
        return text
    try:
        return check_name(text)
    except UsageError as err:
        raise argparse.ArgumentTypeError(f"{clean_message(text)!r} is no cache type: use auto, {CHOICES}") from err


def add_output(parser: argparse.ArgumentParser, *, verbose: bool = True) -> None:
    """-v, on every command."""
    if verbose:
        parser.add_argument("-v", "--verbose", action="count", default=0, help="more on standard error; -vv: all of it")
