"""What the rest of the program knows about a model: resolved numbers, no family names, no optionals to interpret.

This file is torch-free and reads nothing. `resolve.py` fills these from a Hugging Face `config.json`.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of one layer, half-rotation ("NeoX") pairing.

    kind            "default" | "linear" | "dynamic" | "yarn" | "llama3" | "longrope"
    theta           base of the geometric frequency series
    rotary_dim      leading dimensions of a head that rotate (even); the rest pass through
    factor          stretch of the context (linear, dynamic, yarn, llama3); 1.0 when unused
    original_context  tokens the unscaled model was trained on (dynamic, yarn, llama3, longrope)
    attention_factor  multiplies cos and sin; already resolved (yarn, longrope), else 1.0
    """

    kind: str
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    short_factor: tuple[float, ...] = ()  # longrope, rotary_dim / 2 entries
    long_factor: tuple[float, ...] = ()  # longrope, rotary_dim / 2 entries

    @property
    def depends_on_length(self) -> bool:
        """True when the frequencies change once a sequence outgrows `original_context`."""
        return self.kind in ("dynamic", "longrope")

    def effective_length(self, planned: int) -> int:
        """The length that selects the frequencies for a sequence planned to reach `planned` tokens.

        0 for ropes that never change; otherwise equal values mean equal frequencies, so keys of two
        sequences may be shared exactly when this value is equal.
        """
        if not self.depends_on_length:
            return 0
        if planned <= self.original_context:
            return self.original_context
        return planned if self.kind == "dynamic" else self.original_context + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """Gated MLP: down(act(gate(x)) * up(x)). `activation`: "silu" | "gelu" | "gelu_tanh" | "relu"."""

    intermediate_size: int
    activation: str
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """Sparse mixture of gated MLPs: softmax over all experts, the best `experts_per_token`, optionally renormalised."""

    experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    activation: str
    normalize_top: bool  # divide the kept weights by their sum


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer."""

    index: int
    window: int | None  # keys visible to the left, the query's own included; None: all
    rope: RopeSpec
    mlp: MlpSpec | MoeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer, completely described. Sizes in elements, lengths in tokens."""

    architecture: str  # for people; nothing may branch on it
    vocab_size: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    context_length: int  # max_position_embeddings
    norm_eps: float
    norm_weight_offset: float = 0.0  # added to every norm weight: 1.0 where weights are stored around zero
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention output projection
    qk_norm: bool = False  # RMSNorm over head_dim on queries and keys, before rope
    post_norms: bool = False  # further norms on the outputs of attention and MLP, before the residual add
    embedding_scale: float = 1.0  # multiplies the embedding row
    attention_scale: float  # multiplies q.k before softcap and softmax
    attention_softcap: float | None = None  # cap * tanh(score / cap)
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    tied_embeddings: bool = False  # lm_head is the embedding table unless the checkpoint has its own
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    names: "object" = field(repr=False)  # config.names.Names: canonical names -> names in the checkpoint

    def rope_length(self, planned: int) -> int:
        """The largest `RopeSpec.effective_length` over the layers (0 when no rope depends on length)."""
        return max((layer.rope.effective_length(planned) for layer in self.layers), default=0)
