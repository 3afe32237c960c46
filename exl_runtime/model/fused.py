"""The Transformer on a CUDA device: the same blocks, with neighbouring operations joined and nothing that waits for the
host, so that a pass can be recorded as a CUDA graph.

What goes into the last matrix of an MLP is float32, because products of activations outgrow half precision in models
that were made for bfloat16. Knows no graphs: see `graph.py`.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..cache.geometry import CacheGeometry
from ..ops import cuda_small
from ..ops.attention.choose import refusal
from ..ops.attention.cuda import workspace_on
from ..ops.kv_cuda import rope_append
from ..ops.linear.packed_cuda import gated_together, multiply_together
from ..ops.linear.reference import Reference
from .attention import Attention
from .batch import ForwardBatch, by_layer
from .block import Block
from .embedding import Embedding
from .linear import Linear, project
from .mlp import Mlp
from .placement import memory_of
from .transformer import Transformer, require_finite


class Layers(Protocol):
    """Keys and values by layer: a `KVStorage`, or the parts of several."""

    geometry: CacheGeometry

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Key pages and value pages of one layer."""
        ...


class FusedTransformer(Transformer):
    """Backend "cuda". Chosen by the loader; `forward` is that of the base class."""

    def run(self, batch: ForwardBatch, kv: Layers) -> Tensor:
        """`forward` without the check for NaN, which waits for the device: float32 logits (L, vocab)."""
        return self._run(batch, kv, check=False)

    def why_not_recorded(self, kv: Layers) -> str | None:
        """None if a pass over these pages can be recorded, else what in it waits for the host."""
        if any(not isinstance(block.mlp, Mlp) for block in self.blocks):
            return "a mixture of experts asks the host which experts to run"
        linears = (self.head, *(linear for block in self.blocks for linear in block.linears))
        if any(isinstance(linear.kernel, Reference) for linear in linears):
            return "a matrix runs in plain torch"
        return refusal(self.spec.head_dim, kv.layer(0)[0])

    def held_by(self, batch: ForwardBatch) -> tuple[object, ...]:
        """What a pass over `batch` reads and writes that others may let go of: whoever records one has to keep it."""
        return (workspace_on(self.device), *self._angles.read_by(batch))

    def begin(self, batch: ForwardBatch) -> Tensor:
        """The embedded tokens, float32 (T, hidden)."""
        if type(self.embedding) is not Embedding:  # a subclass puts something on top
            return self.embedding(batch.tokens)
        return cuda_small.embed(batch.tokens, self.embedding.table, self.embedding.scale)

    def through(self, x: Tensor, batch: ForwardBatch, kv: Layers, *, check: bool) -> Tensor:
        """x, float32 (T, hidden), after all blocks of this model; changed in place."""
        ropes = self._angles.of_all(batch)
        delta: Tensor | None = None  # what the half-layer before still has to add to the stream
        seen = by_layer(batch, kv.geometry)
        for block in self.blocks:
            pages = kv.layer(block.layer.index)
            h = self._next_norm(x, delta, block.norms.input)
            attended = self._attended(block.attention, h, seen[block.layer.index], ropes[block.layer.rope], *pages)
            delta = self._added(x, block.attention.out, attended, block.norms.post_attention)
            h = self._next_norm(x, delta, block.norms.pre_mlp)
            delta = self._mixed(x, block, h)
            if check:
                x, delta = (x if delta is None else x.add_(delta)), None
                require_finite(x, f"layer {block.layer.index}")
        return x if delta is None else x.add_(delta)

    def finish(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Float32 logits (L, vocab) of the rows that want them."""
        spec = self.spec
        if batch.logit_rows.numel() != x.shape[0]:
            x = x.index_select(0, batch.logit_rows)
        h = cuda_small.rms_norm(x, self.final_norm, spec.norm_eps, spec.norm_weight_offset, dtype=self.dtype)
        logits = self._logits(h)
        if spec.logit_scale != 1.0:
            logits.mul_(spec.logit_scale)
        if (cap := spec.logit_softcap) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    @torch.inference_mode()
    def _run(self, batch: ForwardBatch, kv: Layers, *, check: bool) -> Tensor:
        with memory_of(self.device, f"a pass over {batch.tokens.numel()} tokens"):
            x = self.begin(batch)
            if check:
                require_finite(x, "the token embedding")
            return self.finish(self.through(x, batch, kv, check=check), batch)

    def _attended(
        self,
        attention: Attention,
        h: Tensor,
        batch: ForwardBatch,
        rope: tuple[Tensor, Tensor],
        k_pages: Tensor,
        v_pages: Tensor,
    ) -> Tensor:
        spec, norms = self.spec, attention.norms
        dim, eps, offset = spec.head_dim, spec.norm_eps, spec.norm_weight_offset
        parts = _together((attention.query, attention.key, attention.value), h)
        q, k, v = (part.view(-1, part.shape[-1] // dim, dim) for part in parts)
        if norms is not None:
            q = cuda_small.rms_norm(q, norms.query, eps, offset)
            k = cuda_small.rms_norm(k, norms.key, eps, offset)
        q = rope_append(q, k, v, *rope, k_pages, v_pages, batch.slots)
        lengths = (batch.q_starts, batch.kv_lengths, batch.pages)
        attended = self.ops.paged_attention(
            q, k_pages, v_pages, *lengths, spec.attention_scale, attention.window, spec.attention_softcap
        )
        return attended.reshape(-1, spec.heads * dim)

    def _mixed(self, x: Tensor, block: Block, h: Tensor) -> Tensor | None:
        mlp = block.mlp
        if not isinstance(mlp, Mlp):
            mixed = mlp(h)
            return mixed if block.norms.post_mlp is None else self._norm(mixed, block.norms.post_mlp)
        product = None
        if all(type(linear) is Linear and linear.bias is None for linear in (mlp.gate, mlp.up)):
            product = gated_together(mlp.gate.kernel, mlp.up.kernel, h, mlp.activation, wide=True)
        if product is None:
            gate, up = _together((mlp.gate, mlp.up), h)
            product = cuda_small.gated(gate, up, mlp.activation, dtype=torch.float32)
        return self._added(x, mlp.down, product, block.norms.post_mlp)

    def _added(self, x: Tensor, linear: Linear, h: Tensor, post: Tensor | None) -> Tensor | None:
        """x += norm(h @ W + b): None when that is done, else what is left to add."""
        add_to = getattr(linear.kernel, "add_to", None)
        if post is None and add_to is not None and type(linear) is Linear and linear.bias is None:
            add_to(x, h)
            return None
        y = linear(h)
        return y if post is None else self._norm(y, post)

    def _next_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        eps, offset = self.spec.norm_eps, self.spec.norm_weight_offset
        if delta is None:
            return cuda_small.rms_norm(x, weight, eps, offset, dtype=self.dtype)
        return cuda_small.add_rms_norm(x, delta, weight, eps, offset, dtype=self.dtype)

    def _norm(self, y: Tensor, weight: Tensor) -> Tensor:
        spec = self.spec
        return cuda_small.rms_norm(y, weight, spec.norm_eps, spec.norm_weight_offset, dtype=torch.float32)

    def _logits(self, h: Tensor) -> Tensor:
        wide = getattr(self.head.kernel, "float32", None)
        if wide is not None and type(self.head) is Linear and self.head.bias is None:
            logits: Tensor = wide(h)
            return logits
        return self.head(h).float()


def _together(linears: tuple[Linear, ...], x: Tensor) -> list[Tensor]:
    """[linear(x) for linear in linears] in one launch where the kernels can."""
    if any(type(linear) is not Linear for linear in linears):  # a subclass computes something else around its kernel
        return [linear(x) for linear in linears]
    results = multiply_together([linear.kernel for linear in linears], x)
    if results is None:
        return project(linears, x)
    return [y if linear.bias is None else y.add_(linear.bias) for linear, y in zip(linears, results, strict=True)]
