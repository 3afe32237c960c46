"""How far the stored matrices of a quantized model are from those of its source. Runs neither of the two.

Both folders are read one matrix at a time and dequantized by their formats, a block of output features at a time:
memory holds one stored matrix of each folder and two such blocks, however large the model. The measure is the relative
error in the Frobenius norm, ||Wq - W|| / ||W||. It knows nothing of the activations, so that matrices of different
kinds do not compare; the same matrix in two variants does.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from exl_runtime.checkpoint.reader import Checkpoint
from exl_runtime.config.names import Source
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.config.spec import MlpSpec, ModelSpec
from exl_runtime.errors import EvalError
from exl_runtime.formats.base import LinearShape, QuantFormat
from exl_runtime.formats.dense import Dense
from exl_runtime.model.weights import Weights

HEAD = "lm_head"
BLOCK = 1 << 24  # weights dequantized at once
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixError:
    """One matrix of a layer, or all experts' matrices of one kind together.

    layer  None for the output head
    kind   "q_proj", ..., "down_proj", "gate" (the router), "lm_head"
    bits   per weight as stored, overhead included
    error  ||Wq - W|| / ||W||; over experts, of all of them as one vector
    """

    layer: int | None
    kind: str
    bits: float
    error: float


@dataclass(frozen=True, slots=True)
class _Place:
    """One matrix in the words of the spec: where it may lie, and its shape."""

    layer: int | None
    kind: str
    sources: tuple[Source, ...]
    inputs: int
    outputs: int


def layer_errors(
    reference: Path, variant: Path, done: Callable[[int], None] = lambda layer: None
) -> tuple[MatrixError, ...]:
    """Every matrix of `variant` against the one of `reference`, layer by layer, the head last.

    done  called after each layer with its index
    Raises EvalError when the two folders hold models of different shape; ConfigError, CheckpointError, FormatError
    and NonFiniteError as loading would.
    """
    with ExitStack() as stack:
        source, result = (stack.enter_context(_Opened(folder)) for folder in (reference, variant))
        _require_same_shape(source.spec, result.spec, reference, variant)
        found: list[MatrixError] = []
        for layer in range(len(source.spec.layers)):
            wanted = zip(_places(source.spec, layer), _places(result.spec, layer), strict=True)
            found += _errors((source.matrix(a), result.matrix(b), a.layer, a.kind) for a, b in wanted)
            done(layer)
        found += _errors(iter([(source.head(), result.head(), None, HEAD)]))
    return tuple(found)


def count_layers(folder: Path) -> int:
    """How often `layer_errors` will call `done`. Raises ConfigError or UnsupportedModel."""
    files = load_config(folder)
    return len(resolve(files.config, files.generation).layers)


def mean_bits(errors: tuple[MatrixError, ...], kind: str) -> float | None:
    """Bits per weight of all matrices of one kind; they are of one size. None when there are none."""
    bits = [entry.bits for entry in errors if entry.kind == kind]
    return math.fsum(bits) / len(bits) if bits else None


class _Opened:
    """A folder whose matrices are read one by one."""

    def __init__(self, folder: Path) -> None:
        files = load_config(folder)
        self.spec = resolve(files.config, files.generation)
        self._checkpoint = Checkpoint.open(folder)
        self._weights = Weights(self._checkpoint, self.spec, files.quantization)

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpoint.close()

    def matrix(self, place: _Place) -> QuantFormat:
        return self._weights.linear(place.sources, place.inputs, place.outputs)[0]

    def head(self) -> QuantFormat:
        """The output head; the embedding table where that serves as one."""
        hidden, vocab = self.spec.hidden_size, self.spec.vocab_size
        source = self._weights.head_source()
        if source is not None:
            return self._weights.linear((source,), hidden, vocab)[0]
        table = self._weights.embedding()[:vocab]
        return Dense.load({"weight": table}, LinearShape(hidden, vocab), where="the embedding table")


def _places(spec: ModelSpec, layer: int) -> Iterator[_Place]:
    """All matrices of one layer; experts of one kind after one another."""
    names, hidden, mlp = spec.names, spec.hidden_size, spec.layers[layer].mlp
    wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for kind, outputs in zip(ATTENTION, (wide, narrow, narrow, hidden), strict=True):
        yield _Place(layer, kind, names.linear(layer, kind), wide if kind == "o_proj" else hidden, outputs)
    inner = mlp.intermediate_size
    experts = () if isinstance(mlp, MlpSpec) else range(mlp.experts)
    if not isinstance(mlp, MlpSpec):
        yield _Place(layer, "gate", names.router(layer), hidden, mlp.experts)
    for kind in MLP:
        inputs, outputs = (inner, hidden) if kind == "down_proj" else (hidden, inner)
        if isinstance(mlp, MlpSpec):
            yield _Place(layer, kind, names.linear(layer, kind), inputs, outputs)
        for expert in experts:
            yield _Place(layer, kind, names.expert_linear(layer, expert, kind), inputs, outputs)


def _errors(pairs: Iterator[tuple[QuantFormat, QuantFormat, int | None, str]]) -> list[MatrixError]:
    """One entry per layer and kind, in the order of first appearance."""
    sums: dict[tuple[int | None, str], list[float]] = {}
    for source, result, layer, kind in pairs:
        wrong, all_of_it = _squares(source, result)
        tally = sums.setdefault((layer, kind), [0.0, 0.0, 0.0, 0.0])
        weights = source.shape.in_features * source.shape.out_features
        for index, value in enumerate((wrong, all_of_it, result.storage_bits(), weights)):
            tally[index] += value
    return [
        MatrixError(layer=layer, kind=kind, bits=bits / weights, error=_relative(wrong, all_of_it))
        for (layer, kind), (wrong, all_of_it, bits, weights) in sums.items()
    ]


def _relative(wrong: float, all_of_it: float) -> float:
    if all_of_it == 0.0:
        return 0.0 if wrong == 0.0 else math.inf
    return math.sqrt(wrong / all_of_it)


def _squares(source: QuantFormat, result: QuantFormat) -> tuple[float, float]:
    """Sum of (Wq - W)^2 and of W^2, in float64."""
    wrong = total = 0.0
    step = max(32, BLOCK // source.shape.in_features // 32 * 32)
    for start in range(0, source.shape.out_features, step):
        stop = min(start + step, source.shape.out_features)
        whole = start == 0 and stop == source.shape.out_features
        a, b = ((w if whole else w.columns(start, stop)).dequantize() for w in (source, result))
        total += a.square().sum(dtype=torch.float64).item()
        wrong += b.sub_(a).square_().sum(dtype=torch.float64).item()
    return wrong, total


def _require_same_shape(source: ModelSpec, result: ModelSpec, reference: Path, variant: Path) -> None:
    for what in ("hidden_size", "heads", "kv_heads", "head_dim", "vocab_size"):
        ours, theirs = getattr(source, what), getattr(result, what)
        if ours != theirs:
            raise _Different(variant, reference, what.replace("_", " "), theirs, ours)
    if len(source.layers) != len(result.layers):
        raise _Different(variant, reference, "number of layers", len(result.layers), len(source.layers))
    for ours, theirs in zip(source.layers, result.layers, strict=True):
        shapes = [(m.intermediate_size, getattr(m, "experts", 0)) for m in (ours.mlp, theirs.mlp)]
        if shapes[0] != shapes[1]:
            raise _Different(variant, reference, f"MLP of layer {ours.index}", shapes[1], shapes[0])


class _Different(EvalError):
    def __init__(self, variant: Path, reference: Path, what: str, theirs: object, ours: object) -> None:
        super().__init__(
            f"{variant}: another model than {reference}: {what} {theirs} instead of {ours}",
            hint="the errors of matrices are those of a model and its own source",
        )
