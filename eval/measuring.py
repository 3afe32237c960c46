"""What `compare` and `cache` share: from arguments to windows, reference and a finished `Comparison`."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from exl_runtime.console.progress import Progress
from exl_runtime.errors import ExlError, UsageError
from exl_runtime.model.placement import resolve_device
from exl_runtime.runtime.load import find
from exl_runtime.tokenizer.tokenizer import Tokenizer

from .compare import Job, matrices, measure_all
from .comparison import Comparison, facts, lines
from .data import TextData, chosen_data
from .divergence import Divergence, noise_floor
from .opening import open_model
from .outcome import Outcome
from .protocol import Protocol, Window, chosen_protocol, count_windows, fitted, windows
from .reference import Reference, open_reference
from .report import write_page

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime


class Text:
    """The windows of a text, read anew each time: nothing of it is kept."""

    def __init__(self, protocol: Protocol, data: TextData, tokenizer: Tokenizer) -> None:
        self.protocol, self.data, self.tokenizer = protocol, data, tokenizer

    def __iter__(self) -> Iterator[Window]:
        return windows(self.protocol, self.data, self.tokenizer)

    def __len__(self) -> int:
        return count_windows(self.protocol, self.data, self.tokenizer)

    def describe(self) -> str:
        """The protocol line."""
        return self.protocol.describe(self.data, self.tokenizer)


def run(
    command: str,
    args: argparse.Namespace,
    jobs: Sequence[Job],
    progress: Progress,
    *,
    source: str | None,
    defaults: dict[str, object],
    own: bool = False,
) -> Outcome:
    """Measure `jobs`, write the page if `args.out` names one, and say it all.

    source    the reference; None: perplexity only     own   it is the model of the jobs itself
    defaults  protocol, length and rows where `args` has None
    """
    where = str(resolve_device(args.device))
    known = [source] if source is not None else [job.model for job in jobs]
    text = _text(args, known, [job.model for job in jobs], progress, defaults)
    total = len(text)
    with ExitStack() as stack:
        reference, floor, found, interrupted = None, None, ({}, {}), False
        if source is not None:
            reference = stack.enter_context(open_reference(source, args, text, progress))
        longest = max(2, text.protocol.length)

        def opened(model: str, cache: str) -> "Runtime":
            return open_model(model, args, progress, context=longest, cache=cache)

        rows, interrupted = measure_all(
            jobs,
            opened,
            text,
            total,
            progress,
            reference=reference,
            base=source or "",
            context=args.context,
            device=where,
        )
        if reference is not None and not interrupted:
            floor, interrupted = _floor(reference, args, text, progress)
        if reference is not None and not interrupted and args.out is not None and command == "compare":
            *found, interrupted = matrices(rows, reference.folder, progress)
        comparison = Comparison(
            command=command,
            protocol=text.describe(),
            rows=tuple(rows),
            windows=total,
            reference="" if source is None or own else str(find(source)),
            own=own,
            source="" if reference is None else reference.describe(),
            floor=floor,
            layers=found[0],
            flaws=found[1],
            interrupted=interrupted,
        )
    return _outcome(comparison, args.out)


def require_writable(out: Path | None) -> None:
    """UsageError unless a page can be written there: known before hours of work, not after."""
    if out is None:
        return
    if out.is_dir() or not out.absolute().parent.is_dir():
        what = "a folder" if out.is_dir() else "its folder does not exist"
        raise UsageError(f"-o {out}: {what}", hint="give the name of a file in a folder that exists")


def _outcome(comparison: Comparison, out: Path | None) -> Outcome:
    text = lines(comparison)
    if out is not None:
        write_page(out, comparison)
        text += f"\nreport: {out}"
    return Outcome(
        text=text, facts={**facts(comparison), "report": None if out is None else str(out)}, code=comparison.code
    )


def _text(
    args: argparse.Namespace,
    known: Sequence[str],
    models: Sequence[str],
    progress: Progress,
    defaults: dict[str, object],
) -> Text:
    """The windows that all models can take. The tokenizer is that of the first of `known` that has one."""
    given = {**vars(args)}
    if given["protocol"] is None:
        given["protocol"] = defaults["protocol"]
        given["length"] = args.length or defaults["length"]
    given["rows"] = args.rows or defaults["rows"]
    protocol = chosen_protocol(argparse.Namespace(**given))
    tokenizer, last = None, None
    for model in dict.fromkeys([*known, *models]):
        try:
            protocol = fitted(protocol, model, progress, explicit=args.length is not None)
            if tokenizer is None and model in known:
                tokenizer = Tokenizer.open(find(model))
        except ExlError as err:  # a row will say so, unless there is no other model
            last = err
            if model in known and len(known) == 1:
                raise
    if tokenizer is None:
        assert last is not None
        raise last
    return Text(protocol, chosen_data(args, progress), tokenizer)


def _floor(
    reference: Reference, args: argparse.Namespace, text: Text, progress: Progress
) -> tuple[Divergence | None, bool]:
    """The noise floor; and whether the user interrupted."""
    if args.no_noise_floor:
        return None, False
    try:
        floor = noise_floor(reference, args, text, progress)
    except KeyboardInterrupt:
        return None, True
    return (None, True) if floor.partial else (floor, False)
