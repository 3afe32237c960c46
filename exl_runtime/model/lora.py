"""LoRA adapters on top of a loaded model: y = x @ W + b + sum of weight * scale * (x @ A^T) @ B^T, row by row.

An adapter is two dense kernels for every matrix it changes; the model's own kernels know nothing of it. `Adapted` is
the model once more, over the same weights, with wrapped matrices: it runs the passes in which an adapter takes part,
and the model itself all others. Every row of a pass has its own adapters, and what it gets depends on no other row.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from copy import copy
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from struct import pack
from typing import TypeAlias

import torch
from torch import Tensor

from ..cache.storage import KVStorage
from ..checkpoint.header import short
from ..config.names import LINEARS, Source
from ..errors import AdapterError
from ..formats.base import LinearShape
from ..formats.dense import Dense
from ..ops.linear.base import LinearKernel
from ..ops.linear.select import select
from .adapter_files import Delta, read_adapter
from .batch import Plan
from .block import Block
from .linear import Linear
from .mlp import Mlp
from .transformer import Transformer

Place: TypeAlias = "tuple[int, str]"  # number of the block and one of LINEARS, or HEAD
HEAD: Place = (-1, "head")


@dataclass(frozen=True, slots=True)
class Pair:
    """What one matrix gets added. down: in_features -> rank, up: rank -> out_features, in the order of its kernel."""

    down: LinearKernel
    up: LinearKernel
    scale: float

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        """float32 (rows, out_features); x (rows, in_features), weights float32 (rows, 1). Rows are independent."""
        return self.up(self.down(x.float()).mul_(weights * self.scale))


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter of one model. digest: 16 bytes, the same for the same files; nbytes: memory it holds."""

    pairs: dict[Place, Pair]
    digest: bytes
    rank: int
    nbytes: int


Mix: TypeAlias = "tuple[tuple[Adapter, float], ...]"  # adapters and their weights, in the order of their digests


def mix_of(parts: Iterable[tuple[Adapter, float]]) -> Mix:
    """In the order that all passes add them up in; weights of 0 are left out."""
    return tuple(sorted(((a, float(w)) for a, w in parts if w), key=lambda part: part[0].digest))


def mix_key(parent: bytes, mix: Mix) -> bytes:
    """The root of a prefix tree for a mix: keys and values of one are never found by another. () is `parent`."""
    if not mix:
        return parent
    parts = b"".join(adapter.digest + pack("<d", weight) for adapter, weight in mix)
    return blake2b(parent + b"lora" + parts, digest_size=16).digest()


# --- loading ----------------------------------------------------------------------------------------------------


def load_adapter(folder: Path, model: Transformer) -> Adapter:
    """The adapter in `folder` for this very model, on its device.

    Raises AdapterError naming the module that the model does not have, or whose shape is another; and as
    `read_adapter`.
    """
    files = read_adapter(folder)
    targets = _targets(model)
    pairs: dict[Place, Pair] = {}
    for delta in files.deltas:
        found = targets.get(delta.path)
        if found is None:
            raise AdapterError(f"{folder}: {short(delta.path)} {_unknown(delta.path)}", hint=_AT_HOME)
        for place, source, linear in found:
            pairs[place] = _pair(delta, source, linear, model, folder)
    kernels = {kernel for pair in pairs.values() for kernel in (pair.down, pair.up)}
    rank = max(delta.down.shape[0] for delta in files.deltas)
    return Adapter(pairs, files.digest, rank, sum(kernel.storage_bytes for kernel in kernels))


_AT_HOME = "attention, MLP and output head matrices can be adapted; take the adapter made for this model"


def _unknown(path: str) -> str:
    if "expert" in path:
        return "is an expert of a mixture: adapted experts are not supported"
    return "is no matrix of this model"


def _targets(model: Transformer) -> dict[str, list[tuple[Place, Source, Linear]]]:
    """Module path -> what it is called here, and the part of a fused module's outputs that it stands for."""
    targets: dict[str, list[tuple[Place, Source, Linear]]] = {}
    names = model.spec.names
    for number, block in enumerate(model.blocks):
        for part, linear in _parts(block):
            for source in names.linear(block.layer.index, part):
                targets.setdefault(source.path, []).append(((number, part), source, linear))
    for path in names.head:
        targets.setdefault(path, []).append((HEAD, Source(path), model.head))
    return targets


def _parts(block: Block) -> Iterator[tuple[str, Linear]]:
    """The matrices of a block by name; experts and their router are not among them."""
    mlp = block.mlp.linears if type(block.mlp) is Mlp else ()
    return zip(LINEARS, (*block.attention.linears, *mlp), strict=False)


def _pair(delta: Delta, source: Source, linear: Linear, model: Transformer, folder: Path) -> Pair:
    shape, kernel = linear.kernel.shape, linear.kernel
    total = source.total or shape.out_features
    if delta.down.shape[1] != shape.in_features or delta.up.shape[0] != total:
        raise AdapterError(
            f"{folder}: {short(delta.path)} is a matrix of {delta.down.shape[1]} inputs and {delta.up.shape[0]} "
            f"outputs, the model's has {shape.in_features} and {total}",
            hint="the adapter was made for another model",
        )
    down, up = delta.down, delta.up[source.start : source.stop]
    if kernel.input_order is not None:
        down = down[:, kernel.input_order.to(down.device).long()]
    if kernel.output_order is not None:
        up = up[kernel.output_order.to(up.device).long()]
    rank = down.shape[0]
    where = f"{folder}: {short(delta.path)}"

    def dense(weight: Tensor, inputs: int, outputs: int) -> LinearKernel:
        matrix = Dense.load({"weight": weight.contiguous()}, LinearShape(inputs, outputs), where=where)
        return select(matrix, model.device, model.backend)

    return Pair(dense(down, shape.in_features, rank), dense(up, rank, shape.out_features), delta.scale)


# --- running ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """One adapter in one pass. rows: int64, those it takes part in, None: all; weights: float32 (rows, 1)."""

    adapter: Adapter
    rows: Tensor | None
    weights: Tensor


class AdaptedLinear(Linear):
    """A matrix of the model, and on top of it whatever `shares` say at the time. Shares the kernel and the bias."""

    __slots__ = ("_place", "_shares")

    def __init__(self, linear: Linear, place: Place, shares: list[Share]) -> None:
        super().__init__(linear.kernel, linear.bias)
        self._place = place
        self._shares = shares

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """See the base class."""
        y = super().finish(y, x)
        for share in self._shares:
            pair = share.adapter.pairs.get(self._place)
            if pair is None:
                continue
            if share.rows is None:
                y.add_(pair(x, share.weights))
            else:
                y.index_add_(0, share.rows, pair(x.index_select(0, share.rows), share.weights).to(y.dtype))
        return y


class Adapted:
    """Runs the passes of `model` that adapters take part in. Not thread-safe, as the model itself."""

    def __init__(self, model: Transformer) -> None:
        self._device = model.device
        self._body: list[Share] = []
        self._head: list[Share] = []
        blocks = [self._block(number, block) for number, block in enumerate(model.blocks)]
        self._model = model.with_parts(blocks, AdaptedLinear(model.head, HEAD, self._head))

    def forward_plan(self, plan: Plan, kv: KVStorage) -> Tensor:
        """`Transformer.forward` for a plan with `mixes`: float32 logits (L, vocab)."""
        owners = [index for index, rows in enumerate(_rows(plan)) for _ in range(rows)]
        wanted = [bisect_right(plan.q_starts, row) - 1 for row in plan.logit_rows]
        self._body[:] = _shares(plan.mixes, owners, self._device)
        self._head[:] = _shares(plan.mixes, wanted, self._device)
        try:
            return self._model.forward(plan.on(self._device), kv)
        finally:
            self._body.clear()
            self._head.clear()

    def _block(self, number: int, block: Block) -> Block:
        wrapped = {part: AdaptedLinear(linear, (number, part), self._body) for part, linear in _parts(block)}
        other, attention = copy(block), copy(block.attention)
        attention.query, attention.key = wrapped["q_proj"], wrapped["k_proj"]
        attention.value, attention.out = wrapped["v_proj"], wrapped["o_proj"]
        other.attention = attention
        if type(block.mlp) is Mlp:
            mlp = copy(block.mlp)
            mlp.gate, mlp.up, mlp.down = (wrapped[part] for part in LINEARS[4:])
            other.mlp = mlp
        return other


def _rows(plan: Plan) -> Iterator[int]:
    return (stop - start for start, stop in zip(plan.q_starts, plan.q_starts[1:], strict=False))


def _shares(mixes: Many[Mix], owners: Many[int], device: torch.device) -> list[Share]:
    """owners: of every row its sequence. In the order of the digests, so that each row adds up alike in any batch."""
    rows: dict[Adapter, list[int]] = {}
    weights: dict[Adapter, list[float]] = {}
    for row, owner in enumerate(owners):
        for adapter, weight in mixes[owner]:
            rows.setdefault(adapter, []).append(row)
            weights.setdefault(adapter, []).append(weight)
    return [
        Share(
            adapter,
            None if len(rows[adapter]) == len(owners) else torch.tensor(rows[adapter], device=device),
            torch.tensor(weights[adapter], dtype=torch.float32, device=device)[:, None],
        )
        for adapter in sorted(rows, key=lambda adapter: adapter.digest)
    ]
