"""A float64 Llama in which every token sees what a list says, and from where: the oracle of shortened conversations.

Nothing is turned here: a query looks at recent keys from its own position, and at the first tokens from as many
positions earlier as have left between them.
"""

import torch
from torch import Tensor


def exact(reference, ids: list[int], *, kept: int, shift: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits (tokens, vocab) of a Llama of transformers.

    kept   first tokens that never leave
    shift  int64 (tokens,): how many behind them have left when a token is computed; what it sees begins there
    """
    config, inner = reference.config, reference.to(dtype).model
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, inner.layers[0].self_attn.head_dim
    place = torch.arange(len(ids))
    first = place[None, :] < kept
    distance = torch.where(first, place[:, None] - shift[:, None] - place[None, :], place[:, None] - place[None, :])
    seen = (place[None, :] <= place[:, None]) & (first | (place[None, :] >= kept + shift[:, None]))
    if (window := getattr(config, "sliding_window", None)) is not None:
        seen &= distance < window
    rotary = inner.rotary_emb

    def turned(x: Tensor, positions: Tensor) -> Tensor:  # x (heads, tokens, dim)
        angles = positions.to(dtype)[:, None] * rotary.inv_freq.to(dtype)
        cos, sin = (angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    with torch.inference_mode():
        x = inner.embed_tokens(torch.tensor(ids))
        for layer in inner.layers:
            h, own = layer.input_layernorm(x), layer.self_attn
            q = own.q_proj(h).view(-1, heads, dim).transpose(0, 1)
            k, v = (p(h).view(-1, kv_heads, dim).transpose(0, 1) for p in (own.k_proj, own.v_proj))
            k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
            keys = turned(k, place).transpose(1, 2)
            near, far = turned(q, place) @ keys, turned(q, place - shift) @ keys
            scores = torch.where(first, far, near) * own.scaling
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            x = x + own.o_proj((weights @ v).transpose(0, 1).reshape(len(ids), heads * dim))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return reference.lm_head(inner.norm(x)).to(dtype)
