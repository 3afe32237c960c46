"""The forward pass of one layer over whole rows of tokens: batched, plain torch, differentiable, no cache.

The same mathematics as `exl_runtime.model`, cut at the places where the quantizer looks in: what goes into a group of
matrices, and what they add to the residual stream. Matrices may have any float dtype; the stream is float32.
"""

from collections.abc import Mapping
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from exl_runtime.config import LayerSpec, ModelSpec, MoeSpec, RopeSpec
from exl_runtime.ops.activation import gated
from exl_runtime.ops.moe import route
from exl_runtime.ops.norm import rms_norm
from exl_runtime.ops.rope import cos_sin, frequencies, rope

from .source import Source

LayerWeights = Mapping[str, Tensor]  # the keys of `Source.layer`


class LayerForward:
    """One decoder layer. Holds no weights: every method takes them as `w`, a mapping with the keys of `Source.layer`.

    length  the number of tokens the rows are planned to reach; selects the frequencies of ropes that depend on it
    Hidden states x are float32 (B, T, hidden), at most `length` tokens, positions from 0 on. Gradients flow to x and
    to everything in `w`.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, length: int, device: torch.device) -> None:
        self.spec = spec
        self.layer = layer
        self.length = length
        self.is_moe = isinstance(layer.mlp, MoeSpec)
        positions = torch.arange(length, device=device)
        inv_freq = _frequencies(layer.rope, length).to(device)
        self._cos, self._sin = cos_sin(inv_freq, positions, layer.rope.attention_factor)

    def __call__(self, x: Tensor, w: LayerWeights) -> Tensor:
        """The whole layer: (B, T, hidden) -> (B, T, hidden)."""
        return self.mlp(self.attention_add(x, self.attention_inner(self.attention_input(x, w), w), w), w)

    def mlp(self, x: Tensor, w: LayerWeights) -> Tensor:
        """x plus its MLP or its experts: the second half of the layer."""
        h = self.mlp_input(x, w)
        if self.is_moe:
            return self.moe_add(x, self.moe_output(h, w), w)
        return self.mlp_add(x, self.mlp_inner(h, w), w)

    # --- attention --------------------------------------------------------------------------------------------

    def attention_input(self, x: Tensor, w: LayerWeights) -> Tensor:
        """What goes into q_proj, k_proj and v_proj: the norm of x, (B, T, hidden)."""
        return self._norm(x, w["input_norm"])

    def attention_inner(self, h: Tensor, w: LayerWeights) -> Tensor:
        """What goes into o_proj, (B, T, heads * head_dim), of the input h of the attention."""
        q, k, v = self.queries_keys_values(h, w)
        return self._attend(q, k, v).flatten(2)

    def attention_add(self, x: Tensor, inner: Tensor, w: LayerWeights) -> Tensor:
        """x plus what the attention says: o_proj of `inner`, its bias, the norm behind it where there is one."""
        return x + self._post_norm(linear(inner, w, "o_proj"), w, "post_attention_norm")

    def queries_keys_values(self, h: Tensor, w: LayerWeights, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, heads, head_dim), k and v (B, T, kv_heads, head_dim), rotated, of tokens from position `start` on.

        Raises ValueError for tokens beyond `length`.
        """
        spec, stop = self.spec, start + h.shape[1]
        if stop > self.length:
            raise ValueError(f"{stop} tokens in a pass planned for {self.length}")
        q = linear(h, w, "q_proj").unflatten(-1, (spec.heads, spec.head_dim))
        k = linear(h, w, "k_proj").unflatten(-1, (spec.kv_heads, spec.head_dim))
        v = linear(h, w, "v_proj").unflatten(-1, (spec.kv_heads, spec.head_dim))
        if spec.qk_norm:
            q, k = self._norm(q, w["q_norm"]), self._norm(k, w["k_norm"])
        q, k = rope(q, k, self._cos[start:stop], self._sin[start:stop])
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention, in the shape of q (B, T, heads, head_dim)."""
        spec, tokens, window = self.spec, q.shape[1], self.layer.window
        groups = spec.heads // spec.kv_heads
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if groups > 1:  # written out: fused kernels that know grouped heads by themselves do not exist everywhere
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        windowed = window is not None and window < tokens
        mask = _visible(tokens, window, q.device) if windowed or spec.attention_softcap is not None else None
        if spec.attention_softcap is None:
            causal = mask is None
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=spec.attention_scale)
        else:
            scores = softcap((q @ k.transpose(-1, -2)).float() * spec.attention_scale, spec.attention_softcap)
            out = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1).to(v.dtype) @ v
        return out.transpose(1, 2)

    # --- MLP --------------------------------------------------------------------------------------------------

    def mlp_input(self, x: Tensor, w: LayerWeights) -> Tensor:
        """What goes into gate_proj and up_proj, or into the router and the experts: (B, T, hidden)."""
        return self._norm(x, w["pre_mlp_norm"])

    def mlp_inner(self, h: Tensor, w: LayerWeights) -> Tensor:
        """What goes into down_proj, (B, T, intermediate_size), of the input h of a dense MLP."""
        return gated(linear(h, w, "gate_proj"), linear(h, w, "up_proj"), self.layer.mlp.activation)

    def mlp_add(self, x: Tensor, inner: Tensor, w: LayerWeights) -> Tensor:
        """x plus what a dense MLP says: down_proj of `inner`, its bias, the norm behind it where there is one."""
        return x + self._post_norm(linear(inner, w, "down_proj"), w, "post_mlp_norm")

    def route(self, h: Tensor, w: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Which experts the rows of h (..., hidden) visit, T' rows in all.

        Returns weights float32 (T', k), experts int64 (T', k), logits (T', experts); see `exl_runtime.ops.moe.route`.
        """
        moe = self.layer.mlp
        logits = linear(h.flatten(0, -2), w, "router")
        return *route(logits, moe.experts_per_token, moe.normalize_top), logits

    def expert_inner(self, rows: Tensor, w: LayerWeights, e: int) -> Tensor:
        """What goes into down_proj of expert `e`, (rows, intermediate_size), of rows (rows, hidden) of its input."""
        gate, up = linear(rows, w, f"experts.{e}.gate_proj"), linear(rows, w, f"experts.{e}.up_proj")
        return gated(gate, up, self.layer.mlp.activation)

    def moe_output(self, h: Tensor, w: LayerWeights) -> Tensor:
        """The weighted sum of the experts that every row of h visits, float32 in the shape of h."""
        weights, chosen, _ = self.route(h, w)
        flat = h.flatten(0, -2)
        out = torch.zeros_like(flat, dtype=torch.float32)
        for e in chosen.unique(sorted=True).tolist():
            rows, place = (chosen == e).nonzero(as_tuple=True)
            said = linear(self.expert_inner(flat[rows], w, e), w, f"experts.{e}.down_proj")
            out.index_add_(0, rows, said.float() * weights[rows, place, None])
        return out.view_as(h)

    def moe_add(self, x: Tensor, output: Tensor, w: LayerWeights) -> Tensor:
        """x plus the output of the experts, the norm behind it where there is one."""
        return x + self._post_norm(output, w, "post_mlp_norm")

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.spec.norm_eps, self.spec.norm_weight_offset)

    def _post_norm(self, x: Tensor, w: LayerWeights, key: str) -> Tensor:
        return self._norm(x.float(), w[key]) if self.spec.post_norms else x.float()


class Model:
    """All layers of a small model in memory, for evaluation and tuning: ids int64 (B, T) -> float32 (B, T, vocab).

    weights     one mapping per layer, keys of `Source.layer`; entries may be replaced
    embedding   (rows, hidden);  final_norm (hidden,);  head (hidden, vocab): may be replaced too
    Gradients flow to every tensor that asks for them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: list[LayerForward],
        weights: list[dict[str, Tensor]],
        *,
        embedding: Tensor,
        final_norm: Tensor,
        head: Tensor,
    ) -> None:
        self.spec = spec
        self.layers = layers
        self.weights = weights
        self.embedding = embedding
        self.final_norm = final_norm
        self.head = head

    @classmethod
    def load(cls, source: Source, length: int) -> Self:
        """Every layer of `source` on its device, for rows of up to `length` tokens. Raises what reading does."""
        spec = source.spec
        return cls(
            spec,
            [LayerForward(spec, layer, length, source.device) for layer in spec.layers],
            [source.layer(layer.index) for layer in spec.layers],
            embedding=source.embedding(),
            final_norm=source.final_norm(),
            head=source.head(),
        )

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of every position."""
        return logits(self.spec, self.hidden(ids), self.final_norm, self.head)

    def hidden(self, ids: Tensor) -> Tensor:
        """The residual stream behind the last layer, float32 (B, T, hidden)."""
        x = embed(self.spec, self.embedding, ids)
        for layer, w in zip(self.layers, self.weights, strict=True):
            x = layer(x, w)
        return x


def embed(spec: ModelSpec, table: Tensor, ids: Tensor) -> Tensor:
    """Token ids int64 (B, T) -> float32 (B, T, hidden): rows of `table` (rows, hidden) times embedding_scale."""
    rows = F.embedding(ids, table).float()
    return rows if spec.embedding_scale == 1.0 else rows * spec.embedding_scale


def logits(spec: ModelSpec, x: Tensor, final_norm: Tensor, head: Tensor) -> Tensor:
    """float32 (..., vocab) of the hidden states x (..., hidden) behind the last layer; head (hidden, vocab)."""
    h = rms_norm(x, final_norm, spec.norm_eps, spec.norm_weight_offset)
    out = (h.to(head.dtype) @ head).float()
    if spec.logit_scale != 1.0:
        out = out * spec.logit_scale
    return out if spec.logit_softcap is None else softcap(out, spec.logit_softcap)


def linear(x: Tensor, w: LayerWeights, key: str) -> Tensor:
    """x (..., K) @ w[key] (K, N), plus w[key + ".bias"] (N,) where there is one; the dtype of the matrix."""
    y = x.to(w[key].dtype) @ w[key]
    bias = w.get(f"{key}.bias")
    return y if bias is None else y + bias


def softcap(scores: Tensor, cap: float) -> Tensor:
    """cap * tanh(scores / cap), elementwise."""
    return torch.tanh(scores / cap) * cap


def _frequencies(rope: RopeSpec, length: int) -> Tensor:
    """As `Transformer` chooses them for a sequence planned to reach `length` tokens."""
    given = {field.name: getattr(rope, field.name) for field in fields(rope) if field.name != "attention_factor"}
    return frequencies(**given, length=rope.effective_length(length))


def _visible(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """bool (tokens, tokens): query i sees key j; the window counts the query's own."""
    place = torch.arange(tokens, device=device)
    behind = place[:, None] - place
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)
