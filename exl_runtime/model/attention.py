"""Self-attention over the paged cache: projections, optional query/key norms, rope, append, attend, project back."""

from dataclasses import dataclass

from torch import Tensor

from ..config.spec import ModelSpec
from ..ops.table import OpSet
from .batch import ForwardBatch
from .linear import Linear, project


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm weights over head_dim for queries and keys, float32 (head_dim,)."""

    query: Tensor
    key: Tensor


class Attention:
    """x (T, hidden) -> (T, hidden); appends the keys and values of the T tokens to the layer's pages."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        window: int | None,
        query: Linear,
        key: Linear,
        value: Linear,
        out: Linear,
        norms: HeadNorms | None,
        ops: OpSet,
    ) -> None:
        self.spec = spec
        self.window = window
        self.query, self.key, self.value, self.out = query, key, value, out
        self.norms = norms
        self.ops = ops

    def __call__(
        self, x: Tensor, batch: ForwardBatch, rope: tuple[Tensor, Tensor], k_pages: Tensor, v_pages: Tensor
    ) -> Tensor:
        spec, ops = self.spec, self.ops
        q, k, v = (
            y.view(-1, y.shape[-1] // spec.head_dim, spec.head_dim)
            for y in project((self.query, self.key, self.value), x)
        )
        if self.norms is not None:
            q = ops.rms_norm(q, self.norms.query, spec.norm_eps, spec.norm_weight_offset)
            k = ops.rms_norm(k, self.norms.key, spec.norm_eps, spec.norm_weight_offset)
        q, k = ops.rope(q, k, *rope)
        ops.append_kv(k, v, k_pages, v_pages, batch.slots)
        attended = ops.paged_attention(
            q,
            k_pages,
            v_pages,
            batch.q_starts,
            batch.kv_lengths,
            batch.pages,
            spec.attention_scale,
            self.window,
            spec.attention_softcap,
        )
        return self.out(attended.reshape(-1, spec.heads * spec.head_dim))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer inside."""
        return (self.query, self.key, self.value, self.out)
