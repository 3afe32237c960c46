"""The tuning stage: end-to-end correction of a small model, kept only where it helps on held-out rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .calibration import Calibration
from .checking import half
from .encoded import Encoded
from .encoding import load_encoded
from .progress import Progress
from .source import HEAD, Source
from .store import read_json, read_tensors, write_json, write_tensors
from .tune import STEPS, Tuned, fits, tune
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
    slots = {i: {slot.key: slot for slot in source.slots(i)} for i in layers}
    head = source.head_slot
    encoded, dense = {}, []
    for i in layers:
        encoded |= load_encoded(space, i, slots[i])
        stored = read_tensors(space.layer(i))
        found = {key: stored[name].float() for name, key in source.dense_tensors(i).items()}
        if "router" in found:
            found["router"] = found["router"].t().contiguous()
        for key, slot in slots[i].items():
            if slot.biased:
                found[f"{key}.bias"] = stored[f"{slot.path}.bias"][: slot.outputs].float()
        dense.append({key: value.to(source.device) for key, value in found.items()})
    encoded |= load_encoded(space, None, {HEAD: head})
    encoded = {path: _on(source.device, matrix) for path, matrix in encoded.items()}
    names = {key: name for name, key in source.dense_tensors(None).items()}
    norm = read_tensors(space.layer(None))[names["final_norm"]].float().to(source.device)
    with progress.stage("tuning", STEPS, "steps") as bar:
        result = tune(
            source,
            encoded,
            dense,
            norm,
            rows=data.rows,
            held_out=guard_rows(data.held_out),
            seed=seed,
            embedding=True,
            advance=lambda count, note: bar.advance(count, note=note),
        )
    if result.steps:
        for i, path in zip((*layers, None), files, strict=True):
            write_tensors(path, _tensors(source, result, i))
    write_json(space.tuned / "done.json", {"steps": result.steps, "before": result.before, "after": result.after})


def _on(device: torch.device, matrix: Encoded) -> Encoded:
    tensors = {name: getattr(matrix, name).to(device) for name in ("codes", "scale_codes", "scale_max", "perm")}
    return replace(matrix, **tensors)


def _tensors(source: Source, result: Tuned, i: int | None) -> dict[str, Tensor]:
    """Everything that is stored for one layer, or (None) outside of them."""
    tensors: dict[str, Tensor] = {}
    dense = {"final_norm": result.final_norm, "embedding": result.embedding} if i is None else result.dense[i]
    for slot in (source.head_slot,) if i is None else source.slots(i):
        bias = dense[f"{slot.key}.bias"] if slot.biased else None
        for suffix, tensor in result.encoded[slot.path].tensors(bias, where=slot.path).items():
            tensors[f"{slot.path}.{suffix}"] = tensor.cpu()
    for name, key in source.dense_tensors(i).items():
        value = dense[key].t() if key == "router" else dense[key]
        tensors[name] = half(value, name).cpu().contiguous()
    return tensors
