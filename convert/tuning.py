"""The tuning stage: end-to-end correction of a small model, kept only where it helps on held-out rows."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from exl_runtime.checkpoint.writer import write_tensors
from exl_runtime.console.progress import Progress
from exl_runtime.files import read_json, write_json

from .calibration import Calibration
from .encoding import load_layer, stored_tensors
from .source import Source
from .tune import STEPS, fits, tune
from .workspace import Workspace

GUARD_TOKENS = 1024  # fewer held-out tokens cannot tell whether tuning helps: then it is not tried


def guard_rows(held_out: Tensor) -> Tensor:
    """Every other held-out row decides what is kept; `judge_rows`, the others, never influence the model."""
    return held_out[::2]


def judge_rows(held_out: Tensor) -> Tensor:
    """The held-out rows that the report's figures come from."""
    return held_out[1::2]


def tuned_files(
    source: Source,
    space: Workspace,
    data: Calibration,
    *,
    encoder: str,
    seed: int,
    memory: int,
    progress: Progress,
) -> tuple[Sequence[Path], str]:
    """The files of all layers and the head to be written, and a note for the protocol.

    Tuned ones where the model is small enough for it, the encoder is `best`, and the held-out rows got better.
    """
    layers = [layer.index for layer in source.spec.layers]
    plain = [space.layer(i) for i in (*layers, None)]
    tuned = [space.tuned / path.name for path in plain]
    finished = space.tuned / "done.json"
    if not _finished(finished, tuned):
        if encoder != "best":
            return plain, ""
        space.tuned.mkdir(exist_ok=True)
        enough = guard_rows(data.held_out).numel() >= GUARD_TOKENS
        if enough and fits(source, memory, data.rows.shape[1]):
            _tune(source, space, data, seed, tuned, progress)
        else:  # written down, so that going on later with other memory gives the same model
            write_json(finished, {"steps": 0, "before": None, "after": None})
    found = read_json(finished)
    if not found["steps"]:
        why = "did not help" if found["after"] is not None else "was not tried: too large a model, or too few rows"
        return plain, f"; tuning end to end {why}"
    note = (
        f"; tuned end to end for {found['steps']} steps: divergence on the rows that decided this "
        f"{found['before']:.5f} -> {found['after']:.5f}"
    )
    return tuned, note


def _finished(path: Path, files: Sequence[Path]) -> bool:
    """Tuning was done, and what it wrote is there."""
    return path.exists() and (not read_json(path)["steps"] or all(file.exists() for file in files))


def _tune(
    source: Source, space: Workspace, data: Calibration, seed: int, files: Sequence[Path], progress: Progress
) -> None:
    """Run it and write its files, the one that says so last."""
    layers = [layer.index for layer in source.spec.layers]
    encoded, dense = {}, []
    for i in layers:
        matrices, values = load_layer(source, space, i)
        encoded |= matrices
        dense.append(values)
    head, outside = load_layer(source, space, None)
    with progress.stage("tuning", STEPS, "steps") as bar:
        result = tune(
            source,
            encoded | head,
            dense,
            outside["final_norm"],
            rows=data.rows,
            held_out=guard_rows(data.held_out),
            seed=seed,
            embedding=True,
            advance=lambda count, note: bar.advance(count, note=note),
        )
    if result.steps:
        for i, path in zip((*layers, None), files, strict=True):
            outside = {"final_norm": result.final_norm, "embedding": result.embedding}
            values = outside if i is None else result.dense[i]
            write_tensors(path, stored_tensors(source, i, result.encoded, values))
    write_json(space.tuned / "done.json", {"steps": result.steps, "before": result.before, "after": result.after})
