"""THE table: every way in which a supported family differs from Llama. Data only; `resolve.py` interprets it.

Defaults of `Arch` are Llama's. A default that stands in for a key absent from config.json is the one that the
configuration class of transformers has, because saved configurations may omit keys that equal it.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """One row, keyed by the string in config.json["architectures"].

    Sizes that are None must be stated by config.json (every published one of the family does).
    """

    hf: str
    text_key: str | None = None  # the object inside config.json that describes the language model

    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / heads
    context: int = 2048
    norm_eps: float = 1e-6
    tied: bool = False
    bos: int | None = 1
    eos: int | None = 2
    pad: int | None = None

    # Attention. attention_bias in config.json: "optional" decides over q, k, v and o; "qkv": q, k, v always have one,
    # o never, the key has no say; "none": there is none, and a config that asks for one is refused.
    bias: Literal["optional", "qkv", "none"] = "optional"
    qk_norm: bool = False
    query_scalar: float | None = None  # default of query_pre_attn_scalar; None: the scale comes from head_dim
    attention_softcap: float | None = None  # default of attn_logit_softcapping
    logit_softcap: float | None = None  # default of final_logit_softcapping
    softcaps: frozenset[str] = frozenset()  # which of the two keys the family's forward pass applies
    refused: frozenset[str] = frozenset()  # keys that must be null: the family names them but has no such step

    # Which layers see a window of keys only, where config.json has no layer_types. "all": every layer; "late": from
    # max_window_layers on; "pattern": all but every window_pattern-th. `typed`: layer_types has a say.
    window: Literal["none", "all", "late", "pattern"] = "none"
    sliding_window: int | None = None  # default of the key of that name
    window_switch: bool = False  # off unless use_sliding_window is true
    window_pattern: int = 0
    window_pattern_key: str | None = None
    typed: bool = False

    # Rotary embedding.
    rope_theta: float = 10000.0
    local_rope_theta: float | None = None  # windowed layers have a rope of their own, with this base
    partial_rotary: bool = False  # partial_rotary_factor is honoured
    original_context: int | None = None  # default of original_max_position_embeddings
    longrope_names: frozenset[str] = frozenset({"longrope", "su"})

    # Blocks.
    activation_key: str = "hidden_act"
    activation: str = "silu"
    mlp_bias: bool = False  # the key mlp_bias is honoured
    norm_weight_offset: float = 0.0
    post_norms: bool = False
    scale_embedding: bool = False  # by sqrt(hidden_size)

    # Experts. "all": every layer, width intermediate_size, kept weights renormalised; "mixed": width
    # moe_intermediate_size, dense layers in between, norm_topk_prob decides.
    moe: Literal["none", "all", "mixed"] = "none"
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int | None = None  # default of moe_intermediate_size

    # Spelling of tensor names.
    prefixes: tuple[str, ...] = ("model.",)
    heads_paths: tuple[str, ...] = ("lm_head",)
    fused: bool = False
    lettered_experts: bool = False


LLAMA = Arch(hf="LlamaForCausalLM", mlp_bias=True)

MISTRAL = replace(
    LLAMA,
    hf="MistralForCausalLM",
    kv_heads=8,
    context=131072,
    bias="none",
    mlp_bias=False,
    window="all",
    sliding_window=4096,
)

MIXTRAL = replace(
    MISTRAL,
    hf="MixtralForCausalLM",
    norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
    moe="all",
    experts=8,
    experts_per_token=2,
    lettered_experts=True,
)

QWEN2 = replace(
    LLAMA,
    hf="Qwen2ForCausalLM",
    kv_heads=32,
    context=32768,
    bos=None,
    eos=None,
    bias="qkv",
    mlp_bias=False,
    window="late",
    window_switch=True,
    sliding_window=4096,
    typed=True,
)

QWEN3 = replace(QWEN2, hf="Qwen3ForCausalLM", head_dim=128, bias="optional", qk_norm=True)

QWEN3_MOE = replace(
    QWEN3,
    hf="Qwen3MoeForCausalLM",
    kv_heads=4,
    head_dim=None,
    window="all",
    typed=False,
    moe="mixed",
    experts=128,
    experts_per_token=8,
    expert_size=768,
)

GEMMA2 = Arch(
    hf="Gemma2ForCausalLM",
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    layers=26,
    heads=8,
    kv_heads=4,
    head_dim=256,
    context=8192,
    tied=True,
    bos=2,
    eos=1,
    pad=0,
    query_scalar=256.0,
    attention_softcap=50.0,
    logit_softcap=30.0,
    softcaps=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    window="pattern",
    window_pattern=2,
    sliding_window=4096,
    typed=True,
    activation_key="hidden_activation",
    activation="gelu_pytorch_tanh",
    norm_weight_offset=1.0,
    post_norms=True,
    scale_embedding=True,
)

GEMMA3 = replace(
    GEMMA2,
    hf="Gemma3ForCausalLM",
    vocab_size=262208,
    context=131072,
    qk_norm=True,
    attention_softcap=None,
    logit_softcap=None,
    softcaps=frozenset({"final_logit_softcapping"}),
    refused=frozenset({"attn_logit_softcapping"}),
    window_pattern=6,
    window_pattern_key="sliding_window_pattern",
    rope_theta=1e6,
    local_rope_theta=1e4,
    prefixes=("model.", "language_model.model.", "model.language_model."),
    heads_paths=("lm_head", "language_model.lm_head"),
)

GEMMA3_WITH_VISION = replace(  # the language model alone: images are not supported
    GEMMA3,
    hf="Gemma3ForConditionalGeneration",
    text_key="text_config",
    softcaps=frozenset(),
    refused=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    prefixes=("language_model.model.", "model.language_model.", "model."),
    heads_paths=("language_model.lm_head", "lm_head"),
)

PHI3 = replace(
    LLAMA,
    hf="Phi3ForCausalLM",
    context=4096,
    norm_eps=1e-5,
    eos=32000,
    pad=32000,
    bias="none",
    mlp_bias=False,
    window="all",
    partial_rotary=True,
    original_context=4096,
    longrope_names=frozenset({"longrope", "su", "yarn"}),  # early releases say "yarn" and mean longrope
    fused=True,
)

ARCHS: dict[str, Arch] = {
    arch.hf: arch
    for arch in (
        LLAMA,
        MISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        GEMMA2,
        GEMMA3,
        GEMMA3_WITH_VISION,
        PHI3,
    )
}

SUPPORTED: tuple[str, ...] = tuple(ARCHS)

ALIASES: dict[str, str] = {  # other spellings of the same thing
    "LLaMAForCausalLM": LLAMA.hf,  # conversions made before transformers had a release with the family
}

ACTIVATIONS: dict[str, str] = {  # Hugging Face spelling -> ours; every tanh form below is the same function
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
}

# Options that would change what the model computes, of no supported family: key -> the values that mean "off".
REFUSED: dict[str, tuple[object, ...]] = {
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "add_cross_attention": (None, False),
    "rope_interleaved": (None, False),  # rotates neighbouring pairs instead of halves
    "rope_interleave": (None, False),
    "clip_qkv": (None,),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
}
