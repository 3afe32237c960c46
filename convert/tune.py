"""End-to-end tuning of an encoded small model, inside the format: what is stored moves, its size never does.

The encoder works matrix by matrix; here codes, group maxima, norms and biases learn together to say what the source
says. Adam (Kingma and Ba, 2015) minimises KL(source || tuned) per token. What the format rounds is rounded in every
forward pass, and gradients pass straight through the rounding (Bengio et al., 2013): what is judged is what is stored.
Rows held out decide: the best of a few checkpoints is kept, or the input when none is better. Gains: LOG.md.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exl_runtime.config import LayerSpec, MlpSpec, ModelSpec

from .encoded import Encoded
from .forward import Model, logits
from .source import Source
from .tunable import TunableMatrix, TunableTensor

STEPS = 20  # twice as many gain nothing where layers were tuned before
BATCH = 4  # rows per step
WARM = 5  # steps until the full rate
BETAS = (0.9, 0.99)
CHECKS = 4  # times the tuned model is judged
CACHE_BYTES = 256 << 20  # of the source's last hidden states, so that rows seen again cost it nothing

MOST_ON_CPU, MOST = 50_000_000, 500_000_000  # weights; beyond, a step takes too long
WEIGHT_BYTES = 40  # per weight: source, latent, gradient, two moments, scale, decoded twice, codes of two exports
TABLE_BYTES = 32  # per entry of the embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Step sizes at their peak, about what a value can move in one step.

    code   in steps of the grid (S): those are smaller by themselves where the model is closer to its source
    scale  relative to the group's maximum, and
    dense  of norms, biases and the embedding, relative to the median size of the tensor: both times the root of the
           divergence before tuning, which is about how far there is to go
    """

    code: float = 0.02
    scale: float = 0.016
    dense: float = 0.016


RATES = Rates()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """encoded, dense, final_norm: as given to `tune`, tuned; float32 tensors hold exact halves.

    embedding      float32 (rows, hidden), halves; as the source's, rounded, unless it was tuned too
    before, after  mean KL(source || model) on the held-out rows, nats per token, of what was given and what is returned
    steps          after which the returned model was taken; 0: nothing was better than the input
    """

    encoded: dict[str, Encoded]
    dense: list[dict[str, Tensor]]
    final_norm: Tensor
    embedding: Tensor
    before: float
    after: float
    steps: int
    seconds: float


def fits(source: Source, memory: int, length: int) -> bool:
    """Whether tuning `source` on rows of `length` tokens fits into `memory` bytes and takes bearable time.

    At most 50M weights on the CPU, 500M elsewhere, head included: a step costs eight passes of the model over
    BATCH * length tokens. Memory errs on the safe side.
    """
    spec = source.spec
    weights = source.parameters + source.head_parameters
    if weights > (MOST_ON_CPU if source.device.type == "cpu" else MOST):
        return False
    tokens = BATCH * length
    per_token = 8 * spec.vocab_size
    per_token += sum(activation_floats(spec, layer, length) for layer in spec.layers)
    table = TABLE_BYTES * source.embedding_rows * spec.hidden_size
    return WEIGHT_BYTES * weights + table + 4 * tokens * per_token + CACHE_BYTES <= memory


def tune(
    source: Source,
    encoded: Mapping[str, Encoded],
    dense: list[dict[str, Tensor]],
    final_norm: Tensor,
    *,
    rows: Tensor,
    held_out: Tensor,
    seed: int,
    steps: int = STEPS,
    embedding: bool = False,
    rates: Rates = RATES,
    advance: Callable[[int, str], None] = lambda n, note: None,
) -> Tuned:
    """Tune an encoded model on `rows`, judged on `held_out`, both int64 (rows, length).

    encoded     path -> matrix, of every slot of every layer and of the head
    dense       per layer, keys of `Source.layer`: norms and biases as stored, which are tuned; anything else (a
                router) is used and returned as given. What is missing is the source's, rounded to half
    final_norm  (hidden,), as stored
    steps       of BATCH rows each; 0: only judge
    embedding   tune the token table as well (the rows that the tokens of `rows` reach); the caller has to store it
    advance     called with (1, note) after every step
    The same arguments give the same result on the same machine's CPU. A run that diverges returns its input.
    """
    started = time.perf_counter()
    model = Model.load(source, max(rows.shape[1], held_out.shape[1]))
    device = source.device
    judge = _Judge(model, held_out.to(device))
    given = _Stored(dict(encoded), list(dense), final_norm, model.embedding.half().float())
    best, best_step = given, 0
    before = after = judge(_model(source, model, given))
    tunables = _Tunables(source, model, given, rates, embedding) if steps > 0 else None
    if tunables is not None:
        reference = _Reference(model, rows.to(device))
        order = batches(rows.shape[0], torch.Generator().manual_seed(seed))
        optimizer = torch.optim.Adam(tunables.groups(math.sqrt(max(before, 0.0))), betas=BETAS, fused=True)
        checks = check_points(steps)
        for step in range(1, steps + 1):
            set_pace(optimizer, step, steps)
            loss = _step(source, model, tunables, reference, next(order), optimizer)
            if not math.isfinite(loss):
                break
            if step in checks:
                now = tunables.export()
                divergence = judge(_model(source, model, now))
                if divergence < after:  # never true for NaN
                    best, best_step, after = now, step, divergence
            advance(1, f"KL {loss:.4f}")
    return Tuned(
        encoded=best.encoded,
        dense=best.dense,
        final_norm=best.final_norm,
        embedding=best.embedding,
        before=before,
        after=after,
        steps=best_step,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _Stored:
    """A model as it will be stored."""

    encoded: dict[str, Encoded]
    dense: list[dict[str, Tensor]]
    final_norm: Tensor
    embedding: Tensor


def _model(source: Source, model: Model, stored: _Stored) -> Model:
    """The model that readers of `stored` will see."""
    weights = {path: matrix.weight() for path, matrix in stored.encoded.items()}
    return _assemble(source, model, weights, stored.dense, stored.final_norm, stored.embedding)


def _assemble(
    source: Source,
    model: Model,
    weights: Mapping[str, Tensor],
    dense: Sequence[Mapping[str, Tensor]],
    final_norm: Tensor,
    embedding: Tensor,
) -> Model:
    layers = []
    for i, (original, tensors) in enumerate(zip(model.weights, dense, strict=True)):
        matrices = {slot.key: weights[slot.path] for slot in source.slots(i)}
        rest = {key: value.half().float() for key, value in original.items() if key not in matrices}
        layers.append({**rest, **tensors, **matrices})
    head = weights[source.head_slot.path]
    return Model(source.spec, model.layers, layers, embedding=embedding, final_norm=final_norm, head=head)


@torch.enable_grad()
def _step(
    source: Source,
    model: Model,
    tunables: "_Tunables",
    reference: "_Reference",
    batch: list[int],
    optimizer: torch.optim.Optimizer,
) -> float:
    """One step of Adam; returns the loss before it, mean KL in nats per token."""
    ids, wanted = reference(batch)
    scores = tunables.model(source, model)(ids)
    with torch.no_grad():
        said = torch.log_softmax(scores, dim=-1)
        share = wanted.exp()
        loss = float((share * (wanted - said)).sum(dim=-1).mean())
        # The gradient of KL with respect to the logits, written out: it spares autograd a few tables of the vocabulary.
        gradient = said.exp_().sub_(share).div_(ids.numel())
    optimizer.zero_grad()
    scores.backward(gradient)
    optimizer.step()
    tunables.clamp()
    return loss


def check_points(steps: int) -> set[int]:
    """After which of `steps` steps what is tuned is judged: CHECKS times, the last step included."""
    return {math.ceil(steps * (i + 1) / CHECKS) for i in range(CHECKS)}


def set_pace(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Rates of step 1 ... steps: up to the "peak" of every group over WARM steps, then down along a cosine."""
    pace = min(1.0, step / WARM) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * pace


def activation_floats(spec: ModelSpec, layer: LayerSpec, length: int) -> int:
    """Upper estimate of the activations of one token in one layer, attention scores over `length` tokens included."""
    mlp = layer.mlp
    inner = mlp.intermediate_size * (1 if isinstance(mlp, MlpSpec) else mlp.experts_per_token)
    scores = spec.heads * length  # where no fused kernel spares them
    return 12 * spec.hidden_size + 8 * spec.heads * spec.head_dim + 6 * inner + 4 * scores


def batches(rows: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Rows of every step: all of them in random order, then all again."""
    left: list[int] = []
    while True:
        while len(left) < BATCH:
            left += torch.randperm(rows, generator=generator).tolist()
        yield left[:BATCH]
        left = left[BATCH:]


class _Judge:
    """Mean KL(source || model) over rows kept for judging."""

    def __init__(self, model: Model, rows: Tensor) -> None:
        self._source = model
        self._rows = rows
        self._kept: Tensor | None = None

    @torch.no_grad()
    def __call__(self, model: Model) -> float:
        if self._kept is None:
            self._kept = torch.cat([self._source.hidden(part) for part in self._rows.split(BATCH)])
        total = 0.0
        for part, x in zip(self._rows.split(BATCH), self._kept.split(BATCH), strict=True):
            wanted = _log_probabilities(self._source, x)
            said = torch.log_softmax(model(part), dim=-1)
            total += float((wanted.exp() * (wanted - said)).sum(dim=-1).sum(dtype=torch.float64))
        return total / self._rows.numel()


class _Reference:
    """Rows, and what the source says to them: log-probabilities (B, T, vocab). Keeps hidden states, up to a limit."""

    def __init__(self, model: Model, rows: Tensor) -> None:
        self._model = model
        self._rows = rows
        self._room = CACHE_BYTES // (4 * rows.shape[1] * model.spec.hidden_size)
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        new = [row for row in dict.fromkeys(batch) if row not in self._kept]
        states = dict(self._kept)
        if new:
            states |= zip(new, self._model.hidden(self._rows[new]), strict=True)
            self._kept |= {row: states[row].clone() for row in new[: max(0, self._room - len(self._kept))]}
        return self._rows[batch], _log_probabilities(self._model, torch.stack([states[row] for row in batch]))


def _log_probabilities(model: Model, x: Tensor) -> Tensor:
    return torch.log_softmax(logits(model.spec, x, model.final_norm, model.head), dim=-1)


@dataclass(eq=False)
class _Tunables:
    """Everything that learns, beside the stored model it came from."""

    source: Source
    original: Model
    given: _Stored
    rates: Rates
    with_embedding: bool
    matrices: dict[str, TunableMatrix] = field(init=False)
    dense: list[dict[str, TunableTensor]] = field(init=False)

    def __post_init__(self) -> None:
        source, given, offset = self.source, self.given, self.source.spec.norm_weight_offset
        slots = [(slot, w[slot.key]) for i, w in enumerate(self.original.weights) for slot in source.slots(i)]
        slots.append((source.head_slot, self.original.head))
        self.matrices = {slot.path: TunableMatrix(given.encoded[slot.path], weight) for slot, weight in slots}
        self.dense = [
            {
                key: TunableTensor(value, offset if key.endswith("_norm") else 0.0)
                for key, value in tensors.items()
                if key.endswith(("_norm", ".bias"))
            }
            for tensors in given.dense
        ]
        self.final_norm = TunableTensor(given.final_norm, offset)
        self.embedding = TunableTensor(given.embedding, 0.0) if self.with_embedding else None

    def groups(self, distance: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer. "peak" is the full rate, `distance` a factor of all but that of codes."""
        matrices = self.matrices.values()
        dense = [value for tensors in self.dense for value in tensors.values()] + [self.final_norm]
        dense += [self.embedding] if self.embedding is not None else []
        return [
            {"params": [matrix.latent for matrix in matrices], "peak": self.rates.code},
            {"params": [matrix.growth for matrix in matrices], "peak": self.rates.scale * distance},
            {"params": [value.move for value in dense], "peak": self.rates.dense * distance},
        ]

    def model(self, source: Source, original: Model) -> Model:
        """The model as it would be stored now; gradients flow to the parameters."""
        return _assemble(
            source,
            original,
            {path: matrix.weight() for path, matrix in self.matrices.items()},
            self._dense(lambda value: value.weight()),
            self.final_norm.weight(),
            self.given.embedding if self.embedding is None else self.embedding.weight(),
        )

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep latent codes where they can still come back from."""
        for matrix in self.matrices.values():
            matrix.clamp()

    @torch.no_grad()
    def export(self) -> _Stored:
        return _Stored(
            {path: matrix.export() for path, matrix in self.matrices.items()},
            self._dense(lambda value: value.weight()),
            self.final_norm.weight(),
            self.given.embedding if self.embedding is None else self.embedding.weight(),
        )

    def _dense(self, value: Callable[[TunableTensor], Tensor]) -> list[dict[str, Tensor]]:
        return [
            {**tensors, **{key: value(tuned) for key, tuned in some.items()}}
            for tensors, some in zip(self.given.dense, self.dense, strict=True)
        ]
