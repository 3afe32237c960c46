"""Measures models and cache types one after another on the same windows. Knows no arguments and no formats of output.

Every model is opened, measured and freed before the next; one that cannot be opened or compared is a row that says why.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exl_runtime.cache.geometry import PAGE_SIZE
from exl_runtime.console.progress import Progress
from exl_runtime.errors import ExlError
from exl_runtime.model.summary import summarize
from exl_runtime.runtime.load import find

from .comparison import Row
from .layers import MatrixError, count_layers, layer_errors
from .protocol import Window, conditions

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime

    from .reference import Reference

Opener = Callable[[str, str], "AbstractContextManager[Runtime]"]  # (model, cache)


@dataclass(frozen=True, slots=True)
class Job:
    """One row to be measured. `model`: as the user gave it."""

    model: str
    cache: str


def jobs_of(models: Sequence[str], caches: Sequence[str]) -> list[Job]:
    """Every model with every cache type; what was given twice once."""
    return [Job(model, cache) for model in dict.fromkeys(models) for cache in dict.fromkeys(caches)]


def measure_all(
    jobs: Sequence[Job],
    opened: Opener,
    windows: Iterable[Window],
    total: int,
    progress: Progress,
    *,
    reference: "Reference | None" = None,
    base: str = "",
    context: int | None = None,
    device: str = "cpu",
) -> tuple[list[Row], bool]:
    """The rows of `jobs`, and whether the user interrupted: then the last one may be partial, and some are missing.

    windows    of `total`; iterated once per job
    reference  None: perplexity only
    base       the model whose tokenizer all must share; "": the first that can be opened
    context    tokens for the memory column; None: each model's own
    device     where the models are opened, resolved; settles what the cache type "auto" is
    Passes KeyboardInterrupt through when there is no row yet.
    """
    rows: list[Row] = []
    names = _names(job.model for job in jobs)
    try:
        for job in jobs:
            row = described(job, names[job.model], context, device)
            if not row.problem:
                row, fine = _measured(job, row, opened, windows, total, progress, reference, base)
                base = base or (job.model if fine else "")
            if row.problem:
                progress.warn(f"{row.label}: {row.problem}")
            rows.append(row)
            if row.partial:
                return rows, True
    except KeyboardInterrupt:
        if not rows:
            raise
        return rows, True
    return rows, False


def described(job: Job, name: str, context: int | None = None, device: str = "cpu") -> Row:
    """What the headers say about a job. Never raises ExlError: the row has the problem."""
    try:
        folder = find(job.model)
        summary = summarize(folder, context, cache=job.cache, device=device)
        pages = [summarize(folder, n * PAGE_SIZE, cache=summary.cache_dtype).cache_bytes for n in (1, 2)]
    except ExlError as err:
        return Row(name=name, path=job.model, cache=job.cache, problem=err.problem)
    bits = {kind.kind: kind.bits_per_weight for kind in summary.kinds}
    return Row(
        name=name,
        path=str(folder),
        cache=summary.cache_dtype,
        format=summary.format,
        bits_per_weight=summary.bits_per_weight,
        head_bits=bits["head"] if "head" in bits else bits["embedding"],
        file_bytes=summary.file_bytes,
        memory_bytes=summary.total_bytes,
        bytes_per_token=(pages[1] - pages[0]) / PAGE_SIZE,
        context=summary.context,
    )


def matrices(
    rows: Sequence[Row], reference: Path, progress: Progress
) -> tuple[dict[str, tuple[MatrixError, ...]], dict[str, str], bool]:
    """By path: errors of the matrices of every quantized folder of `rows`; why one has none; True if interrupted."""
    folders = dict.fromkeys(row.path for row in rows if row.format not in ("", "dense"))
    errors: dict[str, tuple[MatrixError, ...]] = {}
    flaws: dict[str, str] = {}
    if not folders:
        return errors, flaws, False
    try:
        layers = count_layers(reference)
        with progress.stage("matrices", len(folders) * layers, "layers") as steps:
            for path in folders:
                try:
                    errors[path] = layer_errors(
                        reference, Path(path), lambda layer, name=Path(path).name: steps.advance(1, name)
                    )
                except ExlError as err:
                    flaws[path] = err.problem
    except ExlError as err:
        flaws.update((path, err.problem) for path in folders)
    except KeyboardInterrupt:
        return errors, flaws, True
    return errors, flaws, False


def _measured(
    job: Job,
    row: Row,
    opened: Opener,
    windows: Iterable[Window],
    total: int,
    progress: Progress,
    reference: "Reference | None",
    base: str,
) -> tuple[Row, bool]:
    """The row with its figures, or with the problem; and whether there was none."""
    from .divergence import measure as diverge
    from .perplexity import measure as hesitate
    from .reference import require_comparable

    try:
        if base and base != job.model:
            require_comparable(base, job.model)
        with opened(job.model, job.cache) as runtime:
            row = replace(row, cache=runtime.info.cache, conditions=conditions(runtime))
            with progress.stage(row.label, total, "windows") as steps:
                if reference is None:
                    alone = hesitate(runtime, windows, steps.advance)
                    found = {"nll": alone.nll, "nll_stderr": alone.stderr}
                    measured = alone
                else:
                    kl = diverge(reference, runtime, windows, steps.advance)
                    found = {"nll": kl.nll_q, "nll_stderr": kl.stderr_q, "divergence": kl}
                    measured = kl
        row = replace(
            row,
            **found,
            tokens=measured.tokens,
            windows=measured.windows,
            seconds=measured.seconds,
            partial=measured.partial,
        )
    except ExlError as err:
        return replace(row, problem=err.problem), False
    return row, True


def _names(models: Iterable[str]) -> dict[str, str]:
    """A name for each model that no other has: its folder's name, or what was given where that is not enough."""
    models = list(dict.fromkeys(models))
    short = {model: Path(model).name or model for model in models}
    taken = list(short.values())
    return {model: name if taken.count(name) == 1 else model for model, name in short.items()}
