"""Tuning of one encoded layer inside the format, while the next ones are still to be encoded: for models of any size.

The encoder works matrix by matrix and knows nothing behind a matrix. Here all of a layer's codes, group maxima, norms
and biases learn together to bring the hidden states behind the layer to those of the source, as in BRECQ (Li et al.,
2021, "Pushing the limit of post-training quantization by block reconstruction"). What an error there costs is taken
from the Fisher information of the source, E[g g^T] over tokens with g the gradient of the log-probability of a drawn
token at the hidden states (hidden, hidden), which BRECQ takes the diagonal of: plain squares gain little (LOG.md).
Adam and straight-through rounding as in `tune`; calibration rows that are not tuned on decide what is kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exl_runtime.files import read_json, write_json

from .encoded import Encoded
from .layerpass import LayerPass
from .source import Source
from .states import States
from .streaming import through
from .tunable import TunableMatrix, TunableTensor
from .tune import BETAS, Rates, activation_floats, batches, check_points, set_pace
from .workspace import Workspace

STEPS = 60
WEIGHT_BYTES = 56  # of a layer's: source, result, latent, two gradients, moments, scale, decoded twice, two exports
RATES = Rates()  # "distance" is the relative error of what the layer adds to the stream
GUARD = 8  # one calibration row in so many decides and is not tuned on
MOST_JUDGED = 12  # rows that decide, in practice: more cost time and decide the same
LEAST_GUARD_TOKENS = 1024  # fewer cannot tell whether tuning helps
RIDGE = 0.1  # of the mean of the Fisher information's diagonal, added to it: thousands of tokens estimate it


def fits(source: Source, memory: int, rows: int, length: int) -> bool:
    """Whether the largest layer can be tuned in `memory` bytes, and `rows` of `length` tokens can judge it.

    Counted: WEIGHT_BYTES per weight of the layer, three tables of the Fisher information, and the activations of a row,
    forward, back and in between. Errs on the safe side.
    """
    spec = source.spec
    if rows // GUARD * length < max(1, LEAST_GUARD_TOKENS):
        return False
    needed = 0
    for layer in spec.layers:
        weights = sum(slot.inputs * slot.outputs for slot in source.slots(layer.index))
        needed = max(needed, WEIGHT_BYTES * weights + 16 * length * activation_floats(spec, layer, length))
    return needed + 12 * spec.hidden_size**2 <= memory


def decide(source: Source, space: Workspace, memory: int, rows: int, length: int) -> bool:
    """`fits`, written down, so that going on later with other memory gives the same model."""
    if not space.blocktune.exists():
        write_json(space.blocktune, {"tune": fits(source, memory, rows, length)})
    return bool(read_json(space.blocktune)["tune"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """before, after: mean weighted squared error on the rows that decide. steps: 0 when nothing was better."""

    before: float
    after: float
    steps: int


def tune_layer(
    run: LayerPass, before: States, fisher: Tensor, *, seed: int, steps: int = STEPS, rates: Rates = RATES
) -> Tuned:
    """Tune the layer that `run` has just encoded; its `done`, `result` and `quantized` are replaced if that helps.

    before  the encoded model's hidden states before the layer;  fisher  float32 (hidden, hidden), any scale
    `run.source` holds what is aimed at: the source's states behind the layer, errors of earlier layers included.
    The same arguments give the same result on the same machine's CPU. A run that diverges changes nothing.
    """
    f, chunk, device = run.forward, run.plan.chunk, run.weights["input_norm"].device
    judged = list(range(GUARD // 2, before.rows, GUARD))[:MOST_JUDGED]  # not the last rows: some are of random tokens
    rows = [row for row in range(before.rows) if row % GUARD != GUARD // 2]
    root = _root(fisher.to(device))

    def read(states: States, some: list[int]) -> Tensor:
        return torch.cat([states.read(row, row + 1) for row in some]).to(device)

    def error(result: Tensor, wanted: Tensor) -> Tensor:
        return ((result - wanted) @ root).square().mean()

    @torch.no_grad()
    def judge(w: dict[str, Tensor]) -> float:
        return sum(float(error(f(read(before, [r]), w), read(run.source, [r]))) for r in judged) / len(judged)

    first = judge(run.result)
    with torch.no_grad():
        added = sum(float(error(read(before, [r]), read(run.source, [r]))) for r in judged) / len(judged)
    tunables = _Tunables(run)
    distance = math.sqrt(first / added) if added > 0 else 0.0
    optimizer = torch.optim.Adam(tunables.groups(rates, distance), betas=BETAS, fused=True)
    order = batches(len(rows), torch.Generator().manual_seed(seed))
    checks = check_points(steps)
    after, kept, best = first, 0, None
    for step in range(1, steps + 1):
        set_pace(optimizer, step, steps)
        optimizer.zero_grad()
        if not math.isfinite(
            tunables.backward(
                lambda w, r: error(f(read(before, [r]), w), read(run.source, [r])), [rows[i] for i in next(order)]
            )
        ):
            break
        optimizer.step()
        tunables.clamp()
        if step in checks:
            encoded, weights = tunables.export()
            now = judge(weights)
            if now < after:  # never true for NaN
                after, kept, best = now, step, (encoded, weights)
    if best is not None:
        for key, matrix in best[0].items():
            run.done[key].encoded = matrix
        run.result = best[1]
        with torch.no_grad():
            through(f, run.result, before, run.quantized, chunk)
    return Tuned(before=first, after=after, steps=kept)


def _root(fisher: Tensor) -> Tensor:
    """R with R R^T the damped Fisher information, its mean diagonal 1; of squares alone, where there is none."""
    size = fisher.shape[0]
    mean = float(fisher.diagonal().double().mean())
    eye = torch.eye(size, device=fisher.device)
    if not (math.isfinite(mean) and mean > 0):
        return eye
    root, info = torch.linalg.cholesky_ex((fisher / mean + RIDGE * eye) / (1 + RIDGE))
    return root if int(info) == 0 else eye


class _Tunables:
    """What learns of one layer."""

    def __init__(self, run: LayerPass) -> None:
        offset = run.forward.spec.norm_weight_offset
        self._given = run.result
        self._matrices = {key: TunableMatrix(e.encoded, run.weights[key]) for key, e in run.done.items()}
        self._dense = {
            key: TunableTensor(value, offset if key.endswith("_norm") else 0.0)
            for key, value in run.result.items()
            if key not in run.done and key.endswith(("_norm", ".bias"))
        }

    def groups(self, rates: Rates, distance: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer, as in `tune`."""
        matrices = self._matrices.values()
        return [
            {"params": [matrix.latent for matrix in matrices], "peak": rates.code},
            {"params": [matrix.growth for matrix in matrices], "peak": rates.scale * distance},
            {"params": [value.move for value in self._dense.values()], "peak": rates.dense * distance},
        ]

    def weights(self) -> dict[str, Tensor]:
        """Keys of `Source.layer`, as they would be stored now; gradients flow to what learns."""
        tuned = {key: value.weight() for key, value in (*self._matrices.items(), *self._dense.items())}
        return {**self._given, **tuned}

    @torch.enable_grad()
    def backward(self, loss: Callable[[dict[str, Tensor], int], Tensor], rows: list[int]) -> float:
        """The mean of `loss(weights, row)`, and its gradient to what learns; one row's activations at a time."""
        made = self.weights()
        leaves = {key: value.detach().requires_grad_(value.requires_grad) for key, value in made.items()}
        total = 0.0
        for row in rows:
            one = loss(leaves, row) / len(rows)
            one.backward()
            total += float(one.detach())
        learning = [key for key, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([made[key] for key in learning], [leaves[key].grad for key in learning])
        return total

    @torch.no_grad()
    def clamp(self) -> None:
        for matrix in self._matrices.values():
            matrix.clamp()

    @torch.no_grad()
    def export(self) -> tuple[dict[str, Encoded], dict[str, Tensor]]:
        """(matrices, all weights)"""
        return {key: matrix.export() for key, matrix in self._matrices.items()}, self.weights()
