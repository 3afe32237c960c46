"""One layer through the encoder: collect what goes into every matrix, encode it, hand the rows on. Knows no files.

Two streams of hidden states run side by side (encoder.md 3): `source`, what the original model computes, and
`result`, what the model encoded so far computes. Matrices are encoded in the order in which data meets them, so that
each one sees, and may correct, the errors of those before it:  q k v -> o -> gate up -> down.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .encoded import Encoded, Layout
from .encoder import Recipe, encode
from .forward import LayerForward, LayerWeights
from .moments import Factor, Moments, factor
from .source import Slot
from .states import States

# Part of the measured error that a matrix is asked to make good. All of it (1.0) fits the calibration text too
# closely: held-out KL is lower at 0.7 on every text and width tried (LOG.md).
CORRECTION = 0.7
EXPERT_BYTES = 1 << 30  # moments of experts collected at a time
Keep = Callable[[int], States]  # width -> somewhere to keep hidden states of that width
Step = Callable[[Tensor, LayerWeights], Tensor]
Leave = Callable[[Tensor, Tensor, LayerWeights], Tensor]
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a layer is encoded.

    layouts   slot key -> layout          recipe  of the encoder
    correct   aim at the source's outputs given the result's inputs; False: at the source's weights, every matrix of a
              half layer seen with unquantized neighbours, as exllamav2 does (formats/exl2.md 6.5)
    chunk     rows worked on at a time
    """

    layouts: Mapping[str, Layout]
    recipe: Recipe
    correct: bool
    chunk: int


@dataclass(slots=True)
class Encoding:
    """One encoded matrix, and how it went. error: relative error of its output on the inputs it was encoded for."""

    encoded: Encoded
    error: float
    seconds: float
    flags: tuple[str, ...] = ()


@dataclass(slots=True)
class LayerPass:
    """The state of one layer on its way. `weights` are the source's, `result` those of the encoded model."""

    forward: LayerForward
    slots: Mapping[str, Slot]
    weights: dict[str, Tensor]
    plan: Plan
    source: States
    quantized: States
    keep: Keep
    advance: Callable[[str], None] = lambda note: None
    done: dict[str, Encoding] = field(default_factory=dict)
    result: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def run(self) -> dict[str, Encoding]:
        """Encode every matrix of the layer; afterwards `quantized` holds the outputs of the layer.

        So does `source` where the plan corrects; else it is neither read nor written. Norms, biases and routers of the
        result are rounded to half, as they are stored. Returns slot key -> encoding.
        """
        self.result = {key: value if key in self.slots else value.half().float() for key, value in self.weights.items()}
        f = self.forward
        self._half(QKV, "o_proj", f.attention_input, f.attention_inner, f.attention_add)
        if f.is_moe:
            self._experts()
        else:
            self._half(GATE_UP, "down_proj", f.mlp_input, f.mlp_inner, f.mlp_add)
        return self.done

    # --- halves of the layer ----------------------------------------------------------------------------------

    def _half(self, first: Sequence[str], last: str, enter: Step, inner: Step, leave: Leave) -> None:
        """Matrices that share an input, then the one behind them: q k v, o of the attention; gate up, down of an MLP.

        enter  stream -> input of the `first` matrices;  inner  that -> input of the `last`;  leave  adds its output
        """
        w0, w1, correct = self.weights, self.result, self.plan.correct
        inputs, out = self._moments(first[0]), self._moments(last, residual=True)
        for _, x, y in self._chunks():
            h = enter(y, w1)
            inputs.add(h, enter(x, w0) if correct else None)
            if not correct:  # the last matrix as seen behind unquantized neighbours
                out.add(inner(h, w0))
        self._encode(first, inputs)
        del inputs  # a few hundred MiB in large models
        kept = self._keeps(last)
        for start, x, y in self._chunks():
            y_inner = inner(enter(y, w1), w1)
            x_inner = inner(enter(x, w0), w0) if correct else None
            if correct:
                out.add(y_inner, x_inner, x - y if out.has_residual else None)
            self._store(kept, start, y_inner, x_inner)
        self._encode((last,), out)
        for start, x, y in self._chunks():
            y_inner, x_inner = self._stored(kept, start, y.shape[0])
            self.quantized.write(start, leave(y, y_inner, w1))
            if correct:
                self.source.write(start, leave(x, x_inner, w0))
        self._drop(kept)

    def _experts(self) -> None:
        """Experts a few at a time, as their moments are large; each sees the tokens that are routed to it."""
        f, w0, w1 = self.forward, self.weights, self.result
        moe = f.layer.mlp
        routes = [f.route(f.mlp_input(y, w1), w1) for _, _, y in self._chunks()]
        assign = Assignment(routes, moe.experts, wanted=max(f.spec.hidden_size, moe.intermediate_size))
        per_expert = 16 * (f.spec.hidden_size**2 + moe.intermediate_size**2)
        batch = max(1, EXPERT_BYTES // per_expert)
        for first in range(0, moe.experts, batch):
            some = range(first, min(first + batch, moe.experts))
            gates = {e: self._moments(f"experts.{e}.gate_proj") for e in some}
            downs = {e: self._moments(f"experts.{e}.down_proj") for e in some}
            for e, (h, source) in self._routed(assign, some):
                gates[e].add(h, source if self.plan.correct else None)
                if not self.plan.correct:
                    downs[e].add(f.expert_inner(h, w0, e))
            for e in some:
                flags = assign.flags(e)
                self._encode([f"experts.{e}.{part}" for part in GATE_UP], gates[e], flags)
            if self.plan.correct:
                for e, (h, source) in self._routed(assign, some):
                    downs[e].add(f.expert_inner(h, w1, e), f.expert_inner(source, w0, e))
            for e in some:
                self._encode((f"experts.{e}.down_proj",), downs[e], assign.flags(e))
        for start, x, y in self._chunks():
            self.quantized.write(start, f.mlp(y, w1))
            if self.plan.correct:
                self.source.write(start, f.mlp(x, w0))

    def _routed(self, assign: "Assignment", experts: range) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(expert, (rows of the result's input, of the source's)) for every chunk of rows and every expert in it."""
        f = self.forward
        for index, (_, x, y) in enumerate(self._chunks()):
            h = f.mlp_input(y, self.result).flatten(0, 1)
            source = f.mlp_input(x, self.weights).flatten(0, 1)
            for e in experts:
                rows = assign.rows(index, e)
                if rows.numel():
                    yield e, (h[rows], source[rows])

    # --- pieces -----------------------------------------------------------------------------------------------

    def _chunks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, source states, result states). Without correction nobody looks at the source's."""
        device = self.weights["input_norm"].device
        for start in range(0, self.quantized.rows, self.plan.chunk):
            stop = min(start + self.plan.chunk, self.quantized.rows)
            y = self.quantized.read(start, stop).to(device)
            yield start, self.source.read(start, stop).to(device) if self.plan.correct else y, y

    def _moments(self, key: str, *, residual: bool = False) -> Moments:
        slot = self.slots[key]
        # Behind a further norm the error of the stream does not reach the matrix unchanged.
        wanted = residual and self.plan.correct and not self.forward.spec.post_norms
        device = self.weights["input_norm"].device
        return Moments(slot.inputs, device, outputs=slot.outputs if wanted else None)

    def _keeps(self, key: str) -> tuple[States, States | None]:
        width = self.slots[key].inputs
        return self.keep(width), self.keep(width) if self.plan.correct else None

    @staticmethod
    def _store(inner: tuple[States, States | None], start: int, y: Tensor, x: Tensor | None) -> None:
        inner[0].write(start, y)
        if inner[1] is not None and x is not None:
            inner[1].write(start, x)

    def _stored(self, inner: tuple[States, States | None], start: int, rows: int) -> tuple[Tensor, Tensor | None]:
        device = self.weights["input_norm"].device
        y = inner[0].read(start, start + rows).to(device)
        return y, None if inner[1] is None else inner[1].read(start, start + rows).to(device)

    @staticmethod
    def _drop(inner: tuple[States, States | None]) -> None:
        for states in inner:
            if states is not None:
                states.discard()

    def _encode(self, keys: Sequence[str], moments: Moments, flags: tuple[str, ...] = ()) -> None:
        """Encode the matrices that `moments` are the inputs of, which are factored once."""
        plan, factors = self.plan, None
        for key in keys:
            started = time.perf_counter()
            factors = factors or factor_for(moments, plan.recipe)
            encoding = encode_matrix(
                self.weights[key], moments, plan.layouts[key], plan.recipe, correct=plan.correct, factors=factors
            )
            encoding.seconds = time.perf_counter() - started
            encoding.flags += flags
            self.done[key] = encoding
            self.result[key] = encoding.encoded.weight()
            self.advance(self.slots[key].path)


def factor_for(moments: Moments, recipe: Recipe) -> Factor:
    """H of collected moments, sorted, damped and factored as the recipe says."""
    return factor(moments.hessian, damping=recipe.damping, floor=recipe.floor)


def encode_matrix(
    weight: Tensor, moments: Moments, layout: Layout, recipe: Recipe, *, correct: bool, factors: Factor | None = None
) -> Encoding:
    """Encode one matrix, weight float32 (K, N), from collected moments.

    `flags` say when H had to be damped beyond the recipe, or was given up. correct: aim at `Moments.target`.
    factors: `factor_for` these moments, where it is known already.
    """
    hessian = moments.hessian
    target = moments.target(weight, strength=CORRECTION) if correct else weight
    factors = factors or factor_for(moments, recipe)
    encoded = encode(target, factors, layout, recipe)
    off = encoded.weight() - target
    power = float((target * (hessian @ target)).sum())
    lost = float((off * (hessian @ off)).sum())
    error = (max(lost, 0.0) / power) ** 0.5 if power > 0 else 0.0
    return Encoding(encoded, error, 0.0, _damping_flags(factors, recipe))


def _damping_flags(factors: Factor, recipe: Recipe) -> tuple[str, ...]:
    if factors.u is None:
        return ("rounded: its Hessian is not positive definite",)
    first = max(recipe.damping, recipe.floor / float(factors.h.diagonal().double().mean()))
    if factors.damping < 1.5 * first:
        return ()
    return (f"Hessian damped by {factors.damping:.2g}",)


class Assignment:
    """Which rows of every chunk each expert is encoded for: those routed to it, and more where they are too few.

    A rare expert gets the rows whose router scores are the next best for it, up to `wanted` rows in all.
    """

    def __init__(self, routes: list[tuple[Tensor, Tensor, Tensor]], experts: int, wanted: int) -> None:
        chosen = [torch.zeros(logits.shape, dtype=torch.bool, device=logits.device) for _, _, logits in routes]
        for mask, (_, picks, _) in zip(chosen, routes, strict=True):
            mask.scatter_(1, picks, True)
        self.routed = sum(mask.sum(dim=0) for mask in chosen).tolist()
        total = sum(mask.shape[0] for mask in chosen)
        self.borrowed = [0] * experts
        for e in range(experts):
            missing = min(wanted, total) - self.routed[e]
            if missing > 0:
                # float64 and a stable sort: the same rows are picked whatever the chunks
                scores = torch.cat(
                    [
                        logits[:, e].double().masked_fill(mask[:, e], float("-inf"))
                        for mask, (_, _, logits) in zip(chosen, routes, strict=True)
                    ]
                )
                best = torch.argsort(scores, descending=True, stable=True)[:missing]
                extra = torch.zeros(total, dtype=torch.bool, device=scores.device)
                extra[best] = True
                self.borrowed[e] = missing
                start = 0
                for mask in chosen:
                    mask[:, e] |= extra[start : start + mask.shape[0]]
                    start += mask.shape[0]
        self._rows = [[mask[:, e].nonzero()[:, 0] for e in range(experts)] for mask in chosen]

    def rows(self, chunk: int, expert: int) -> Tensor:
        """int64: rows of the flattened chunk."""
        return self._rows[chunk][expert]

    def flags(self, expert: int) -> tuple[str, ...]:
        """What a reader of the report should know."""
        if not self.borrowed[expert]:
            return ()
        return (f"{self.routed[expert]} tokens routed, {self.borrowed[expert]} more borrowed from the next best",)
