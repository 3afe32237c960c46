"""Bytes that one decoding step has to read: weights and keys and values. From headers and sizes, nothing measured."""

from dataclasses import dataclass

from exl_runtime.cache.geometry import PAGE_SIZE
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.config.spec import ModelSpec, MoeSpec
from exl_runtime.model.summary import summarize
from exl_runtime.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Traffic:
    """weights: bytes of one step over `batch` sequences. token: cache bytes of one token in one layer. windows: keys
    a layer sees, None: all."""

    weights: float
    token: float
    windows: tuple[int | None, ...]
    batch: int

    def step(self, start: int, tokens: int) -> float:
        """Mean bytes of a step while every sequence grows from `start` tokens by `tokens`."""
        kv = 0.0
        for window in self.windows:
            lengths = range(start + 1, start + tokens + 1)  # a step reads what it has just written, too
            kv += sum(length if window is None else min(length, window) for length in lengths) * self.token
        return self.weights + self.batch * kv / tokens


def traffic_of(runtime: Runtime, batch: int) -> Traffic:
    """Of an opened model. Of experts, those that `batch` tokens choose at the most; of the embedding, nothing."""
    spec = spec_of(runtime)
    kinds = {kind.kind: kind.weights * kind.bits_per_weight / 8 for kind in summarize(runtime.info.path).kinds}
    idle = kinds.get("experts", 0.0) * _idle_share(spec, batch)
    # A head that shares the embedding table counts as a matrix of its own in weight_bytes.
    read = runtime.info.weight_bytes - idle - kinds["embedding"]
    positions = runtime.stats.pages_total * PAGE_SIZE
    token = runtime.info.cache_bytes / positions / len(spec.layers)
    return Traffic(read, token, tuple(layer.window for layer in spec.layers), batch)


def spec_of(runtime: Runtime) -> ModelSpec:
    """The sizes of an opened model."""
    files = load_config(runtime.info.path)
    return resolve(files.config, files.generation)


def _idle_share(spec: ModelSpec, batch: int) -> float:
    """Of all experts' weights, the share that a step leaves alone."""
    shares = [
        1 - min(1.0, layer.mlp.experts_per_token * batch / layer.mlp.experts)
        for layer in spec.layers
        if isinstance(layer.mlp, MoeSpec)
    ]
    return sum(shares) / len(shares) if shares else 0.0
