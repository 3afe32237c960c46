"""One decoder layer: attention and MLP on a residual stream.

The stream is float32 on every device: a few models outgrow half precision there, and it costs next to nothing.
What goes into a matrix has the working dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.spec import LayerSpec, ModelSpec
from ..ops.table import OpSet
from .attention import Attention
from .batch import ForwardBatch
from .linear import Linear
from .mlp import Mlp
from .moe import Moe


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNorms:
    """Float32 (hidden,) weights; the two `post` norms exist only when ModelSpec.post_norms."""

    input: Tensor
    pre_mlp: Tensor
    post_attention: Tensor | None = None
    post_mlp: Tensor | None = None


class Block:
    """x float32 (T, hidden) -> (T, hidden). x is updated in place; `dtype` is the working dtype of the matrices."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        layer: LayerSpec,
        norms: BlockNorms,
        attention: Attention,
        mlp: Mlp | Moe,
        ops: OpSet,
        dtype: torch.dtype,
    ) -> None:
        self.layer = layer
        self.norms = norms
        self.attention = attention
        self.mlp = mlp
        self._eps = spec.norm_eps
        self._offset = spec.norm_weight_offset
        self._rms_norm = ops.rms_norm
        self._dtype = dtype

    def __call__(
        self, x: Tensor, batch: ForwardBatch, rope: tuple[Tensor, Tensor], k_pages: Tensor, v_pages: Tensor
    ) -> Tensor:
        attended = self.attention(self._norm(x, self.norms.input).to(self._dtype), batch, rope, k_pages, v_pages)
        if self.norms.post_attention is not None:
            attended = self._norm(attended, self.norms.post_attention)
        x.add_(attended)
        mixed = self.mlp(self._norm(x, self.norms.pre_mlp).to(self._dtype))
        if self.norms.post_mlp is not None:
            mixed = self._norm(mixed, self.norms.post_mlp)
        return x.add_(mixed)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._rms_norm(x, weight, self._eps, self._offset)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer inside."""
        return (*self.attention.linears, *self.mlp.linears)
