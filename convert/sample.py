"""Calibration text that needs no file: rows of tokens drawn from the source model itself, many at a time.

Ids in, ids out; what the openings say is the caller's business.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from exl_runtime.config import ModelSpec
from exl_runtime.errors import ConvertError, NonFiniteError

from .forward import LayerForward, LayerWeights, embed, logits, softcap
from .source import Source

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
SMALL = 50_000_000  # weights; up to here a model is held in float32, which costs little
CACHE_BYTES = 512 << 20  # keys, values and logits of the rows that are drawn together, or
CACHE_SHARE = 4  # this part of the weights, whichever is more: large models must be read for many rows at once


def sample_rows(
    source: Source,
    *,
    rows: int,
    length: int,
    temperatures: Sequence[float],
    seed: int,
    openings: Sequence[Sequence[int]],
    progress: Progress | None = None,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
) -> Tensor:
    """int64 (rows, length) on the CPU: ancestral sampling, the same for the same arguments on the same machine.

    temperatures  row i is drawn at temperatures[i % len], greater than 0
    openings      non-empty lists of ids; row i starts with openings[i % len], then goes on by itself. Where it draws
                  an end-of-sequence id, the beginning-of-sequence id (if the model has one) and the next opening
                  follow: a packed row, whose later documents may see the earlier ones
    dtype         of the matrices and the cache; None: float32 for small models, else bfloat16
    memory        bytes that weights and cache may take together; None: not checked
    Raises ConvertError when they do not fit, NonFiniteError when the logits are not finite, and what reading raises.
    """
    _require_arguments(source.spec, rows, length, temperatures, openings)
    if dtype is None:
        small = source.parameters + source.head_parameters <= SMALL
        dtype = torch.float32 if small else torch.bfloat16
    at_once = _plan(source, rows, length, dtype, memory)
    # One number per token, drawn beforehand: neither the device nor the split into batches changes a row's luck.
    luck = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))
    heat = torch.tensor([temperatures[i % len(temperatures)] for i in range(rows)], dtype=torch.float32)
    with torch.no_grad():
        model = Decoder(source, length, dtype)
        done = []
        for start in range(0, rows, at_once):
            part = slice(start, min(start + at_once, rows))
            documents = _Documents(source.spec, openings, range(part.start, part.stop), source.device)

            def step(tokens: int, before: int = start) -> None:
                if progress is not None:
                    progress(before * length + tokens, rows * length)

            done.append(_draw(model, documents, luck[part], heat[part], step).cpu())
    return torch.cat(done)


class Decoder:
    """All layers of a model with narrow matrices, fed one token of every row at a time."""

    def __init__(self, source: Source, length: int, dtype: torch.dtype) -> None:
        spec = self.spec = source.spec
        self.length, self.dtype, self.device = length, dtype, source.device
        self.layers = [LayerForward(spec, layer, length, source.device) for layer in spec.layers]
        self.weights = [self._narrow(source.layer(layer.index)) for layer in spec.layers]
        self.table = source.embedding().to(dtype)
        self.head = self.table[: spec.vocab_size].t() if source.head_is_embedding else source.head().to(dtype)
        self.final_norm = source.final_norm()

    def _narrow(self, w: dict[str, Tensor]) -> dict[str, Tensor]:
        """Norms and routers stay float32: they are small, and a router's choice is all or nothing."""
        wide = {key for key in w if key.endswith("_norm") or key == "router"}
        return {key: w[key] if key in wide else w.pop(key).to(self.dtype) for key in list(w)}

    def new_cache(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (rows, kv_heads, length, head_dim) of every layer."""
        shape = (2, rows, self.spec.kv_heads, self.length, self.spec.head_dim)
        return [tuple(torch.empty(shape, dtype=self.dtype, device=self.device)) for _ in self.layers]

    def __call__(self, tokens: Tensor, position: int, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """int64 (rows,), the tokens at `position` -> float32 (rows, vocab)."""
        x = embed(self.spec, self.table, tokens[:, None])
        for layer, w, (keys, values) in zip(self.layers, self.weights, cache, strict=True):
            x = layer.mlp(self._attention(layer, w, x, position, keys, values), w)
        return logits(self.spec, x[:, 0], self.final_norm, self.head)

    def _attention(
        self, layer: LayerForward, w: LayerWeights, x: Tensor, position: int, keys: Tensor, values: Tensor
    ) -> Tensor:
        spec = self.spec
        q, k, v = layer.queries_keys_values(layer.attention_input(x, w), w, position)
        keys[:, :, position], values[:, :, position] = k[:, 0], v[:, 0]
        first = 0 if layer.layer.window is None else max(0, position + 1 - layer.layer.window)
        keys, values = keys[:, :, first : position + 1], values[:, :, first : position + 1]
        # All query heads of a group see the same keys, so they stand where a row of queries would.
        q = q.view(-1, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
        if spec.attention_softcap is None:
            out = F.scaled_dot_product_attention(q, keys, values, scale=spec.attention_scale)
        else:
            scores = (q @ keys.transpose(-1, -2)).float() * spec.attention_scale
            out = torch.softmax(softcap(scores, spec.attention_softcap), dim=-1).to(values.dtype) @ values
        return layer.attention_add(x, out.reshape(x.shape[0], 1, -1), w)


class _Documents:
    """Which tokens of every row are given: its opening, and what follows an end-of-sequence id."""

    def __init__(
        self, spec: ModelSpec, openings: Sequence[Sequence[int]], rows: Sequence[int], device: torch.device
    ) -> None:
        count = len(openings)
        bos = [] if spec.bos_id is None else [spec.bos_id]
        again = [list(ids) if [ids[0]] == bos else [*bos, *ids] for ids in openings]
        given = [*map(list, openings), *again]  # as the first document of a row, then as a later one
        width = max(map(len, given))
        self.count = count
        self.table = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in given], device=device)
        self.lengths = torch.tensor([len(ids) for ids in given], device=device)
        self.ends = torch.tensor(spec.eos_ids, dtype=torch.int64, device=device)
        self.current = torch.tensor([row % count for row in rows], device=device)
        self.place = torch.zeros_like(self.current)

    def next(self, drawn: Tensor) -> Tensor:
        """The tokens of the next position: the given ones, else those of `drawn` int64 (rows,)."""
        given = self.place < self.lengths[self.current]
        tokens = torch.where(given, self.table[self.current, self.place.clamp(max=self.table.shape[1] - 1)], drawn)
        ended = torch.isin(tokens, self.ends) & ~given
        self.place = torch.where(ended, 0, self.place + 1)
        self.current = torch.where(ended, self.count + (self.current + 1) % self.count, self.current)
        return tokens


def _draw(model: Decoder, documents: _Documents, luck: Tensor, heat: Tensor, step: Callable[[int], None]) -> Tensor:
    """Rows (B, length) of one batch; luck (B, length) and heat (B,) on the CPU."""
    rows, length = luck.shape
    luck, heat = luck.to(model.device), heat.to(model.device)
    cache = model.new_cache(rows)
    out = torch.empty(rows, length, dtype=torch.int64, device=model.device)
    finite = torch.ones((), dtype=torch.bool, device=model.device)
    out[:, 0] = documents.next(torch.zeros_like(out[:, 0]))
    for position in range(1, length):
        scores = model(out[:, position - 1], position - 1, cache)
        drawn, total = _choose(scores / heat[:, None], luck[:, position])
        finite &= total.isfinite().all()
        out[:, position] = documents.next(drawn)
        step(rows * (position + 1))
    if not finite:
        raise NonFiniteError(
            "text sampled from the source model: its logits contain NaN or infinity",
            hint="the weights are damaged; or pass --calibration FILE if only 16-bit arithmetic is too narrow for it",
        )
    return out


def _choose(scores: Tensor, luck: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of the distribution function at `luck` in [0, 1): ids (B,), and the sum of all probabilities (B,)."""
    sums = torch.softmax(scores, dim=-1).cumsum(dim=-1)
    total = sums[:, -1]
    # Rounding must not lift the target to the total itself, behind which there is no token.
    target = torch.minimum(luck * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(sums, target[:, None], right=True)[:, 0]
    return found.clamp(max=scores.shape[1] - 1), total


def _plan(source: Source, rows: int, length: int, dtype: torch.dtype, memory: int | None) -> int:
    """How many rows to draw together; never a matter of free memory, so that a seed gives the same rows every time."""
    spec = source.spec
    table = source.embedding_rows * spec.hidden_size
    head = 0 if source.head_is_embedding else source.head_parameters
    weights = dtype.itemsize * (source.parameters + head + table)
    cached = 2 * len(spec.layers) * spec.kv_heads * spec.head_dim * length * dtype.itemsize
    per_row = cached + 4 * 4 * spec.vocab_size  # logits, probabilities and their sums
    at_once = max(1, min(rows, max(CACHE_BYTES, weights // CACHE_SHARE) // per_row))
    at_once = -(-rows // -(-rows // at_once))  # batches of about equal size
    reading = max(*(source.layer_bytes(layer.index) for layer in spec.layers), 4 * table)
    needed = weights + reading + at_once * per_row
    if memory is not None and needed > memory:
        raise ConvertError(
            f"{source.folder}: sampling calibration text from the model itself takes {needed / 1e9:.1f} GB, "
            f"{memory / 1e9:.1f} GB are free",
            hint="pass --calibration FILE with a text to use instead; that holds one layer at a time",
        )
    return at_once


def _require_arguments(
    spec: ModelSpec, rows: int, length: int, temperatures: Sequence[float], openings: Sequence[Sequence[int]]
) -> None:
    if rows < 1 or length < 1:
        raise ValueError(f"{rows} rows of {length} tokens, wanted at least one of one")
    if not temperatures or not all(temperature > 0 for temperature in temperatures):
        raise ValueError(f"temperatures {list(temperatures)}, wanted at least one and all greater than 0")
    if not openings or not all(openings):
        raise ValueError("every row needs an opening of at least one token")
    wrong = next((i for ids in openings for i in ids if not 0 <= i < spec.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"an opening holds token id {wrong}, the vocabulary has 0 to {spec.vocab_size - 1}")
