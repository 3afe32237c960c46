"""LoRA adapters of a loaded model: what each of its matrices gets on top, row by row. `adapted.py` runs them.

A change is kernels of its own beside the model's: thin matrices and biases, rescaled outputs (DoRA), whole matrices in
place of the model's. The model's kernels know nothing of it, and an adapter of weight w has w times its effect.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from struct import pack
from typing import TypeAlias

from torch import Tensor

from ..ops.linear.base import LinearKernel

Place: TypeAlias = "tuple[int, str]"  # number of the block and the name of a matrix there, or HEAD
HEAD: Place = (-1, "head")
ROUTER = "router"


def expert_part(expert: int, part: str) -> str:
    """The name of an expert's matrix in a `Place`."""
    return f"experts.{expert}.{part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one matrix gets added. Vectors and outputs in the order of its kernel; kernels take float32.

    down, up  in_features -> rank -> out_features, times scale
    shift     float32 (out_features,): a bias
    stretch   float32 (out_features,): as many times the model's own output (DoRA's m / norm - 1)
    whole     in_features -> out_features, instead of the model's own output; `columns`: int64, only there
    """

    down: LinearKernel | None = None
    up: LinearKernel | None = None
    scale: float = 1.0
    shift: Tensor | None = None
    stretch: Tensor | None = None
    whole: LinearKernel | None = None
    columns: Tensor | None = None

    @property
    def looks(self) -> bool:
        """Whether the model's own output matters."""
        return self.stretch is not None or self.whole is not None

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """float32 (rows, out_features). x (rows, in_features), weights float32 (rows, 1). Rows are independent.

        y (rows, out_features): what the model's kernel made of x, without a bias.
        """
        x = x.float()
        parts = []
        if self.down is not None and self.up is not None:
            parts.append(self.up(self.down(x).mul_(weights * self.scale)))
        if self.stretch is not None:
            parts.append(y.float() * self.stretch * weights)
        if self.whole is not None and self.columns is None:
            parts.append((self.whole(x) - y.float()).mul_(weights))
        elif self.whole is not None:
            only = (self.whole(x) - y.index_select(1, self.columns).float()).mul_(weights)
            parts.append(only.new_zeros(y.shape).index_copy_(1, self.columns, only))
        if self.shift is not None:
            parts.append(weights * self.shift)
        total = parts[0]
        for part in parts[1:]:
            total.add_(part)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class TableChange:
    """What the embedding gets added.

    rows     (tokens, rank) through `up` to hidden, times scale; or (tokens, hidden) instead of the model's own rows
    scale    of the model's embedding too, see `Embedding`
    stretch  float32 (hidden,): as many times the model's own rows
    lookup   int64 (vocab,): the row in `rows` of every token, -1: none; None: the token's own number
    """

    rows: Tensor
    scale: float
    up: LinearKernel | None = None
    stretch: Tensor | None = None
    lookup: Tensor | None = None

    def __call__(self, tokens: Tensor, own: Tensor, weights: Tensor) -> Tensor:
        """float32 (T, hidden). tokens int64 (T,); own float32 (T, hidden): the model's rows; weights float32 (T, 1)."""
        at = tokens if self.lookup is None else self.lookup.index_select(0, tokens)
        rows = self.rows.index_select(0, at.clamp_min(0)).float()
        if self.up is None:
            added = rows.mul_(self.scale).sub_(own).mul_(weights)
            return added if self.lookup is None else added.masked_fill_((at < 0)[:, None], 0.0)
        added = self.up(rows.mul_(weights * self.scale))
        return added if self.stretch is None else added.add_(own * self.stretch * weights)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter of one model. digest: 16 bytes, the same for the same files; nbytes: memory it holds.

    Changes of one place are added up in their order.
    """

    changes: dict[Place, tuple[Change, ...]]
    table: tuple[TableChange, ...]
    digest: bytes
    rank: int
    nbytes: int

    @cached_property
    def mixtures(self) -> frozenset[int]:
        """The blocks of which an expert is changed. Asked for in every pass, and there may be ten thousand changes."""
        return frozenset(block for block, part in self.changes if part.startswith("experts."))


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


def held_by(changes: Iterable[Change | TableChange]) -> int:
    """Bytes of memory, each kernel and each tensor once."""
    held = {part for change in changes for part in _parts(change)}
    return sum(part.nbytes if isinstance(part, Tensor) else part.storage_bytes for part in held)


def _parts(change: Change | TableChange) -> Iterator[LinearKernel | Tensor]:
    for name in change.__slots__:
        part = getattr(change, name)
        if isinstance(part, LinearKernel | Tensor):
            yield part
