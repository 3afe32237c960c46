"""From the dictionaries of config.json and generation_config.json to a `ModelSpec`. Pure: no files, no torch.

An architecture, activation, rope kind or option that is not known raises; nothing falls back to another family.
"""

import math
from collections.abc import Mapping

from ..errors import ConfigError, UnsupportedModel
from .archs import ACTIVATIONS, ALIASES, ARCHS, REFUSED, SUPPORTED, Arch
from .fields import DAMAGED, Fields, shown
from .names import Names
from .rope import FULL, SLIDING, parse_ropes
from .spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec

MAX_LAYERS = 1000
MAX_VOCAB = 2**24
MAX_WIDTH = 2**20
MAX_HEADS = 2**14
MAX_EXPERTS = 4096


def resolve(config: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelSpec:
    """Describe the model of a config.json (and generation_config.json, for the stop ids) in numbers.

    Raises UnsupportedModel for what this runtime does not know, ConfigError for values that make no sense.
    """
    outer = Fields(config, "config.json")
    arch = _architecture(outer)
    fields = outer
    if arch.text_key is not None:
        inner = outer.child(arch.text_key)
        if inner is None:
            raise ConfigError(f'config.json: "{arch.text_key}" is missing', hint=DAMAGED)
        fields = inner
    _refuse_options(fields, arch)

    vocab = fields.integer("vocab_size", arch.vocab_size, high=MAX_VOCAB)
    hidden = fields.integer("hidden_size", arch.hidden_size, high=MAX_WIDTH)
    heads = fields.integer("num_attention_heads", arch.heads, high=MAX_HEADS)
    # null says "as many as heads" in every family, absence only in some.
    kv_default = heads if fields.is_null("num_key_value_heads") else arch.kv_heads or heads
    kv_heads = fields.integer("num_key_value_heads", kv_default, high=MAX_HEADS)
    if heads % kv_heads:
        raise ConfigError(
            f'{fields.where}: "num_attention_heads" ({heads}) must be a multiple of "num_key_value_heads" ({kv_heads})',
            hint=DAMAGED,
        )
    head_dim = _head_dim(fields, arch, hidden, heads)
    context = fields.integer("max_position_embeddings", arch.context)
    inner_size = fields.integer("intermediate_size", arch.intermediate_size, high=MAX_WIDTH)
    attention_bias = fields.flag("attention_bias", False) if arch.bias == "optional" else False
    layers = _layers(fields, arch, head_dim=head_dim, context=context, inner_size=inner_size)
    expert_size = next((layer.mlp.intermediate_size for layer in layers if isinstance(layer.mlp, MoeSpec)), 0)
    made = Fields(generation or {}, "generation_config.json")
    return ModelSpec(
        architecture=arch.hf,
        vocab_size=vocab,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=layers,
        context_length=context,
        norm_eps=fields.number("rms_norm_eps", arch.norm_eps),
        norm_weight_offset=arch.norm_weight_offset,
        qkv_bias=attention_bias or arch.bias == "qkv",
        out_bias=attention_bias,
        qk_norm=arch.qk_norm,
        post_norms=arch.post_norms,
        embedding_scale=math.sqrt(hidden) if arch.scale_embedding else 1.0,
        attention_scale=_attention_scale(fields, arch, head_dim),
        attention_softcap=_softcap(fields, "attn_logit_softcapping", arch.attention_softcap, arch),
        logit_softcap=_softcap(fields, "final_logit_softcapping", arch.logit_softcap, arch),
        tied_embeddings=(outer if outer.has("tie_word_embeddings") else fields).flag("tie_word_embeddings", arch.tied),
        bos_id=_single("bos_token_id", (outer, fields, made), arch.bos, vocab),
        eos_ids=_stops((made, outer, fields), arch.eos, vocab),
        pad_id=_single("pad_token_id", (outer, fields, made), arch.pad, vocab),
        names=Names(
            prefixes=arch.prefixes,
            heads=arch.heads_paths,
            query_size=heads * head_dim,
            key_size=kv_heads * head_dim,
            inner_size=inner_size,
            expert_size=expert_size,
            hidden_size=hidden,
            fused=arch.fused,
            post_norms=arch.post_norms,
            lettered=arch.lettered_experts,
        ),
    )


def _architecture(config: Fields) -> Arch:
    named = config.texts("architectures")
    if not named:
        raise ConfigError(
            'config.json: "architectures" is missing, so the kind of model is unknown',
            hint="take config.json from the model's page again",
        )
    arch = ARCHS.get(ALIASES.get(named[0], named[0]))
    if arch is None:
        raise UnsupportedModel(
            f"config.json: architecture {shown(named[0])} is not supported", hint=f"supported: {', '.join(SUPPORTED)}"
        )
    return arch


def _refuse_options(fields: Fields, arch: Arch) -> None:
    harmless = dict(REFUSED)
    if arch.bias == "none":
        harmless["attention_bias"] = (None, False)
    if not arch.mlp_bias:
        harmless["mlp_bias"] = (None, False)
    harmless.update(dict.fromkeys(arch.refused, (None,)))
    for key, values in harmless.items():
        value = fields.values.get(key)
        if not any(value is known or (type(value) is type(known) and value == known) for known in values):
            raise UnsupportedModel(
                f'{fields.where}: "{key}" = {shown(value)} is not supported for {arch.hf}',
                hint="this option changes what the model computes",
            )


def _head_dim(fields: Fields, arch: Arch, hidden: int, heads: int) -> int:
    if arch.head_dim is None and not fields.has("head_dim"):
        if hidden % heads:
            raise ConfigError(
                f'{fields.where}: "hidden_size" ({hidden}) must be a multiple of "num_attention_heads" ({heads})',
                hint='or config.json must state "head_dim"',
            )
        return hidden // heads
    return fields.integer("head_dim", arch.head_dim, high=8192)


def _attention_scale(fields: Fields, arch: Arch, head_dim: int) -> float:
    if arch.query_scalar is None:
        return head_dim**-0.5
    return fields.number("query_pre_attn_scalar", arch.query_scalar) ** -0.5


def _softcap(fields: Fields, key: str, default: float | None, arch: Arch) -> float | None:
    if key not in arch.softcaps or fields.is_null(key) or (default is None and not fields.has(key)):
        return None
    return fields.number(key, default)


def _layers(fields: Fields, arch: Arch, *, head_dim: int, context: int, inner_size: int) -> tuple[LayerSpec, ...]:
    count = fields.integer("num_hidden_layers", arch.layers, high=MAX_LAYERS)
    full, sliding = parse_ropes(fields, arch, head_dim=head_dim, context=context)
    windows = _windows(fields, arch, count)
    mlps = _mlps(fields, arch, count, inner_size)
    return tuple(
        LayerSpec(index=i, window=windows[i], rope=full if windows[i] is None else sliding, mlp=mlps[i])
        for i in range(count)
    )


def _windows(fields: Fields, arch: Arch, count: int) -> list[int | None]:
    """The window of every layer; layer_types comes before the family's own pattern."""
    switched_on = fields.flag("use_sliding_window", False) if arch.window_switch else arch.window != "none"
    window = None
    if switched_on and not fields.is_null("sliding_window") and (arch.sliding_window or fields.has("sliding_window")):
        window = fields.integer("sliding_window", arch.sliding_window)
    types = fields.texts("layer_types")
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise UnsupportedModel(f"{fields.where}: layer type {shown(kind)} is not supported")
    if types and len(types) != count:
        raise ConfigError(
            f'{fields.where}: "layer_types" has {len(types)} entries, "num_hidden_layers" is {count}', hint=DAMAGED
        )
    if not arch.typed:
        if types and set(types) != {FULL if window is None else SLIDING}:
            raise UnsupportedModel(f"{fields.where}: layers of different types are not supported for {arch.hf}")
        return [window] * count
    windowed = [kind == SLIDING for kind in types] or _pattern(fields, arch, count, window is not None)
    if window is None and any(windowed):
        raise ConfigError(f'{fields.where}: some layers need a window, but "sliding_window" is not set', hint=DAMAGED)
    return [window if here else None for here in windowed]


def _pattern(fields: Fields, arch: Arch, count: int, has_window: bool) -> list[bool]:
    if arch.window == "late":
        first = fields.integer("max_window_layers", 28, low=0)
        return [has_window and i >= first for i in range(count)]
    period = arch.window_pattern
    if arch.window_pattern_key is not None:
        period = fields.integer(arch.window_pattern_key, period)
    return [(i + 1) % period != 0 for i in range(count)]


def _mlps(fields: Fields, arch: Arch, count: int, inner_size: int) -> list[MlpSpec | MoeSpec]:
    named = fields.text(arch.activation_key, arch.activation)
    if named not in ACTIVATIONS:
        raise UnsupportedModel(
            f'{fields.where}: activation {shown(named)} ("{arch.activation_key}") is not supported',
            hint=f"supported: {', '.join(ACTIVATIONS)}",
        )
    activation = ACTIVATIONS[named]
    bias = fields.flag("mlp_bias", False) if arch.mlp_bias else False
    dense = MlpSpec(intermediate_size=inner_size, activation=activation, bias=bias)
    if arch.moe == "none":
        return [dense] * count
    # Old configurations say num_experts or num_local_experts by family; transformers 5 writes the latter for both.
    key = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
    experts = fields.integer(key, arch.experts, low=0, high=MAX_EXPERTS)
    if experts == 0:
        if arch.moe == "all":
            raise fields.error(key, "greater than 0")
        return [dense] * count
    sparse = MoeSpec(
        experts=experts,
        experts_per_token=fields.integer("num_experts_per_tok", arch.experts_per_token, high=experts),
        intermediate_size=inner_size
        if arch.moe == "all"
        else fields.integer("moe_intermediate_size", arch.expert_size, high=MAX_WIDTH),
        activation=activation,
        normalize_top=arch.moe == "all" or fields.flag("norm_topk_prob", False),
    )
    if arch.moe == "all":
        return [sparse] * count
    step = fields.integer("decoder_sparse_step", 1)
    plain = set(fields.integers("mlp_only_layers", low=0, high=MAX_LAYERS))
    return [dense if i in plain or (i + 1) % step else sparse for i in range(count)]


def _ids(fields: Fields, key: str) -> tuple[int, ...]:
    """Token ids; -1 is how old files say "none"."""
    return tuple(i for i in fields.integers(key, low=-1, high=2**31 - 1) if i >= 0)


def _single(key: str, places: tuple[Fields, ...], default: int | None, vocab: int) -> int | None:
    """The first id found, else the family's default unless a place says null. An id outside the vocabulary is none."""
    for fields in places:
        if fields.has(key):
            if isinstance(fields.values[key], list):
                raise fields.error(key, "one integer")
            found = _ids(fields, key)
            return found[0] if found and found[0] < vocab else None
    if default is None or default >= vocab or any(fields.is_null(key) for fields in places):
        return None
    return default


def _stops(places: tuple[Fields, ...], default: int | None, vocab: int) -> tuple[int, ...]:
    """Every end-of-sequence id that any place names, in order. Ids outside the vocabulary can never be drawn."""
    key = "eos_token_id"
    found = [i for fields in places for i in _ids(fields, key)]
    if not found and default is not None and not any(key in fields.values for fields in places):
        found = [default]
    return tuple(dict.fromkeys(i for i in found if i < vocab))
