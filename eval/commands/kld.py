"""`kld`: how far a model is from its source."""

import argparse
from typing import TYPE_CHECKING

from exl_runtime.console.progress import Progress
from exl_runtime.errors import ExlError, UsageError

from ..data import add_data, chosen_data
from ..divergence import Divergence, measure, noise_floor, times_floor, verdict
from ..opening import add_loading, open_model
from ..outcome import Outcome
from ..protocol import Protocol, add_protocol, chosen_protocol, conditions, fitted
from ..reference import Reference, add_reference, cache_folder, open_reference, require_comparable
from ..tables import Table, left, number, right

if TYPE_CHECKING:
    from ..measuring import Text

HELP = "how far a model is from its source: KL divergence, agreement, and the noise floor below which it means nothing"
USAGE = "MODEL --reference SOURCE [--data NAME|FILE...] [--protocol NAME] [options]"
LENGTH, ROWS = 512, 20
EPILOG = f"""\
Without --protocol: {ROWS} windows of {LENGTH} tokens side by side: --protocol gptq --length {LENGTH} --rows {ROWS}.
Twenty windows are about 10,000 tokens, which settle a mean KL to a few percent, and keep the file of the reference
below 3 GB for a vocabulary of 128,000; whatever the protocol, --rows is {ROWS} unless given.

example:
  python -m eval kld models/mine-4.0bpw --reference models/mine"""


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kld`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a local model folder, or `demo`, the bundled toy")
    parser.add_argument("--reference", metavar="SOURCE", help="folder of the model that MODEL was made from")
    add_data(parser)
    add_protocol(parser)
    parser.set_defaults(protocol=None)
    add_reference(parser)
    parser.add_argument("--no-noise-floor", action="store_true", help="do not run the source in bf16 for comparison")
    parser.add_argument(
        "--clear-reference-cache", action="store_true", help="delete all that --reference-cache keeps, first"
    )
    add_loading(parser)


def run(args: argparse.Namespace, progress: Progress) -> Outcome:
    """Compare; raises ExlError subclasses."""
    cleared = _clear(args) if args.clear_reference_cache else None
    if args.model is None or args.reference is None:
        if cleared is not None and args.model is None and args.reference is None:
            return cleared
        missing = "MODEL" if args.model is None else "--reference SOURCE"
        raise UsageError(f"{missing} is missing", hint="python -m eval kld MODEL --reference SOURCE")
    if cleared is not None:
        progress.say(cleared.text)
    return _compare(args, progress)


def _compare(args: argparse.Namespace, progress: Progress) -> Outcome:
    from exl_runtime.runtime.load import find
    from exl_runtime.tokenizer.tokenizer import Tokenizer

    from ..measuring import Text

    require_comparable(args.reference, args.model)
    data = chosen_data(args, progress)
    protocol = _protocol(args, progress)
    text = Text(protocol, data, Tokenizer.open(find(args.reference)))
    with open_reference(args.reference, args, text, progress) as reference:
        with open_model(args.model, args, progress, context=max(2, reference.longest)) as runtime:
            with progress.stage("divergence", total=reference.windows, unit="windows") as steps:
                found = measure(reference, runtime, text, steps.advance)
            name, how = runtime.info.name, conditions(runtime)
        floor, why = None, "not asked for"
        if found.partial:
            why = f"unknown, as you stopped after {found.windows} of {reference.windows} windows"
        elif not args.no_noise_floor:
            try:
                floor = noise_floor(reference, args, text, progress)
            except KeyboardInterrupt:
                why = "unknown, as you stopped before it"
            except ExlError as err:  # hours of work may lie behind: what there is still counts
                progress.warn(f"no noise floor: {err}")
                why = f"unknown: {err.problem}"
            else:
                if floor.partial:
                    why = f"of the first {floor.windows} of {reference.windows} windows, as you stopped there"
        stopped = found.partial or why.startswith("unknown, as you") or (floor is not None and floor.partial)
        return _outcome(name, how, text, reference, found, floor, why, stopped)


def _protocol(args: argparse.Namespace, progress: Progress) -> Protocol:
    """As asked for, or the default of this command; windows that both models can take."""
    given = dict(vars(args))
    if args.protocol is None:
        given.update(protocol="gptq", length=args.length or LENGTH)
    given.update(rows=args.rows or ROWS)
    protocol = chosen_protocol(argparse.Namespace(**given))
    for model in (args.reference, args.model):
        protocol = fitted(protocol, model, progress, explicit=args.length is not None)
    return protocol


def _clear(args: argparse.Namespace) -> Outcome:
    from ..reference_file import clear

    folder = cache_folder(args)
    files, size = clear(folder)
    return Outcome(
        text=f"{folder}: {files} files deleted, {size / 2**20:.1f} MiB",
        facts={"folder": str(folder), "files": files, "bytes": size},
    )


def _outcome(
    name: str,
    how: str,
    text: "Text",
    reference: Reference,
    found: Divergence,
    floor: Divergence | None,
    why: str,
    stopped: bool,
) -> Outcome:
    """why: there is no noise floor, or only a part of it. stopped: by the user."""
    columns = [found] if floor is None else [found, floor]
    titles = [name, *(["noise floor"] if floor else [])]
    table = Table([left("KL(reference || model), nats per token"), *(right(title) for title in titles)])
    table.add("mean", *(number(x.mean, ".6f") for x in columns))
    table.add("standard error", *(number(x.stderr, ".6f") for x in columns))
    for title, field in (("median", "median"), ("90 %", "p90"), ("99 %", "p99"), ("max", "max")):
        table.add(title, *(number(getattr(x, field), ".6f") for x in columns))
    for low, high, _ in found.by_position:
        table.add(f"mean after {low} to {high} tokens", *(number(_at(x, low, high), ".6f") for x in columns))
    table.add("same most likely token, %", *(number(100 * x.top1, ".2f") for x in columns))
    table.add("reference's one in the top 5, %", *(number(100 * x.top5, ".2f") for x in columns))
    table.add("perplexity", *(number(x.perplexity_q, ".4f") for x in columns))
    table.add("perplexity of the reference", *(number(x.perplexity_p, ".4f") for x in columns))
    described = text.describe()
    lines = [
        f"protocol: {described}",
        f"model: {name}; {how}",
        f"reference: {reference.describe()}",
        f"scored: {found.tokens} tokens in {found.windows} windows, {found.seconds:.1f} s",
        "",
        table.text(),
        "",
    ]
    if stopped:
        lines.append("interrupted: these figures are of what was done by then")
    if floor is None or floor.partial:
        lines.append(f"noise floor: {why}")
    if floor is not None:
        lines.append(f"verdict: {verdict(found, floor)}")
    return Outcome(
        text="\n".join(lines),
        facts={
            "model": name,
            "reference": reference.name,
            "protocol": described,
            "conditions": how,
            "reference_file": None if reference.path is None else str(reference.path),
            "reference_reused": reference.reused,
            "divergence": _all_facts(found),
            "noise_floor": None if floor is None else _all_facts(floor),
            "times_noise_floor": None if floor is None else times_floor(found, floor),
            "verdict": None if floor is None else verdict(found, floor),
            "partial": stopped,
        },
        code=130 if stopped else 0,
    )


def _all_facts(found: Divergence) -> dict[str, object]:
    return {**found.facts(), "perplexity_p": found.perplexity_p, "perplexity_q": found.perplexity_q}


def _at(found: Divergence, low: int, high: int) -> float | None:
    return next((mean for start, end, mean in found.by_position if (start, end) == (low, high)), None)
