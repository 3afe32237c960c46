"""Runs passes in which LoRA adapters take part: y = x @ W + b + sum of weight * change, row by row.

`Adapted` is the model once more, over the same weights, with wrapped matrices: it runs the passes in which an adapter
takes part, unless the native pass of the model itself can have them, and the model all others. Every row of a pass has
its own adapters, and what it gets depends on no other row.
"""

from bisect import bisect_right
from collections.abc import Iterator
from collections.abc import Sequence as Many
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.storage import KVStorage
from ..config.names import LINEARS
from ..errors import NonFiniteError
from .adapted_step import NativeAdapters
from .adapter_loading import stages
from .batch import Plan
from .block import Block
from .embedding import Embedding
from .linear import Linear
from .lora import HEAD, ROUTER, Adapter, Mix, Place, expert_part
from .mlp import Mlp
from .moe import Moe
from .split_model import Part, SplitTransformer
from .transformer import Transformer


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
        parts = [(share, change) for share in self._shares for change in share.adapter.changes.get(self._place, ())]
        own = y.clone() if any(change.looks for _, change in parts) else y
        y = super().finish(y, x)
        for share, change in parts:
            if share.rows is None:
                y.add_(change(x, own, share.weights))
            else:
                given = (tensor.index_select(0, share.rows) for tensor in (x, own))
                y.index_add_(0, share.rows, change(*given, share.weights).to(y.dtype))
        return y


class AdaptedEmbedding(Embedding):
    """The embedding of the model, and on top of its rows whatever `shares` say at the time."""

    def __init__(self, embedding: Embedding, shares: list[Share]) -> None:
        super().__init__(embedding.table, scale=embedding.scale)
        self._shares = shares

    def __call__(self, tokens: Tensor) -> Tensor:
        """See the base class."""
        x = super().__call__(tokens)
        parts = [(share, change) for share in self._shares for change in share.adapter.table]
        own = x.clone() if parts else x
        for share, change in parts:
            if share.rows is None:
                x.add_(change(tokens, own, share.weights))
            else:
                given = (tensor.index_select(0, share.rows) for tensor in (tokens, own))
                x.index_add_(0, share.rows, change(*given, share.weights))
        return x


class AdaptedMoe(Moe):
    """A mixture of experts whose router and experts are wrapped: an expert sees some rows, and their shares only."""

    def __init__(self, moe: Moe, block: int, shares: list[Share]) -> None:
        self._block, self._shares = block, shares
        self._inside: list[Share] = []  # of the rows that an expert is looking at
        experts = []
        for number, expert in enumerate(moe.experts):
            names = [(block, expert_part(number, part)) for part in LINEARS[4:]]
            experts.append(_wrapped(expert, names, self._inside))
        router = AdaptedLinear(moe.router, (block, ROUTER), shares)
        super().__init__(router=router, experts=experts, spec=moe.spec, route=moe.route)

    def __call__(self, x: Tensor) -> Tensor:
        """See the base class."""
        weights, chosen = self.route(self.router(x), self.spec.experts_per_token, self.spec.normalize_top)
        out = torch.zeros_like(x)
        reaching = [share for share in self._shares if self._block in share.adapter.mixtures]
        for expert in chosen.unique(sorted=True).tolist():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            self._inside[:] = _narrowed(reaching, rows, x.shape[0])
            out.index_add_(0, rows, self.experts[expert](x[rows]) * weights[rows, place, None].to(x.dtype))
        self._inside.clear()
        return out


class Adapted:
    """Runs the passes of `model` that adapters take part in. Not thread-safe, as the model itself."""

    def __init__(self, model: Transformer | SplitTransformer) -> None:
        self._base = model
        self._native = None if isinstance(model, SplitTransformer) else NativeAdapters(model)
        self._device = model.device
        self._body: dict[torch.device, list[Share]] = {stage.device: [] for stage in stages(model)}
        self._head: list[Share] = []
        self._head_device = stages(model)[-1].device
        self._model: Transformer | SplitTransformer
        if isinstance(model, SplitTransformer):
            parts = [Part(part.stage, self._stage(part.model), part.bridge) for part in model.parts]
            self._model = SplitTransformer(model.spec, parts)
        else:
            self._model = self._stage(model)

    def forward_plan(self, plan: Plan, kv: KVStorage) -> Tensor:
        """`Transformer.forward` for a plan with `mixes`: float32 logits (L, vocab)."""
        if self._native is not None and self._native.share(plan):
            try:
                return self._base.forward_plan(plan, kv)
            except NonFiniteError:
                pass  # what follows says where, with the adapters
            except BaseException:
                self._native.forget()
                raise
        owners = [index for index, rows in enumerate(_rows(plan)) for _ in range(rows)]
        wanted = [bisect_right(plan.q_starts, row) - 1 for row in plan.logit_rows]
        for device, body in self._body.items():
            body[:] = _shares(plan.mixes, owners, device)
        self._head[:] = _shares(plan.mixes, wanted, self._head_device)
        try:
            return self._model.forward(plan.on(self._device), kv)
        finally:
            for shares in (*self._body.values(), self._head):
                shares.clear()

    def draw_plan(self, plan: Plan, kv: KVStorage, draws: Many[float], banned: Many[int]) -> list[int] | None:
        """`Transformer.draw_plan` for a plan with `mixes`. None, too, where the native pass cannot have them."""
        if self._native is None or not self._native.share(plan):
            return None
        assert isinstance(self._base, Transformer)
        try:
            return self._base.draw_plan(plan, kv, draws, banned)
        except BaseException:
            self._native.forget()
            raise

    def _stage(self, model: Transformer) -> Transformer:
        """The model, or the part of one on one device, with everything wrapped."""
        shares = self._body[model.device]
        blocks = [_block(block, shares) for block in model.blocks]
        head, embedding = model.head, model.embedding
        if head is not None:  # None in a stage that is not the last
            head = AdaptedLinear(head, HEAD, self._head)
        if embedding is not None:
            embedding = AdaptedEmbedding(embedding, shares)
        return model.with_parts(blocks, head, embedding)


def _block(block: Block, shares: list[Share]) -> Block:
    index = block.layer.index
    other, attention = copy(block), copy(block.attention)
    attention.query, attention.key, attention.value, attention.out = (
        AdaptedLinear(linear, (index, part), shares)
        for part, linear in zip(LINEARS, block.attention.linears, strict=False)
    )
    other.attention = attention
    if isinstance(block.mlp, Mlp):
        other.mlp = _wrapped(block.mlp, [(index, part) for part in LINEARS[4:]], shares)
    else:
        other.mlp = AdaptedMoe(block.mlp, index, shares)
    return other


def _wrapped(mlp: Mlp, places: Many[Place], shares: list[Share]) -> Mlp:
    other = copy(mlp)
    other.gate, other.up, other.down = (
        AdaptedLinear(linear, place, shares) for linear, place in zip(mlp.linears, places, strict=True)
    )
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


def _narrowed(shares: Many[Share], rows: Tensor, total: int) -> list[Share]:
    """The shares in a pass over `rows`, int64, of the `total` rows that `shares` are of."""
    found = []
    for share in shares:
        if share.rows is None:
            found.append(Share(share.adapter, None, share.weights.index_select(0, rows)))
            continue
        place = torch.full((total,), -1, device=rows.device)
        place[share.rows] = torch.arange(len(share.rows), device=rows.device)
        at = place.index_select(0, rows)
        taking = (at >= 0).nonzero().flatten()
        if len(taking):
            own = None if len(taking) == len(rows) else taking
            found.append(Share(share.adapter, own, share.weights.index_select(0, at[taking])))
    return found
