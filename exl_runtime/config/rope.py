"""From the rope dictionaries of a configuration to `RopeSpec`. Torch-free: numbers only, no frequencies.

Two spellings exist: `rope_theta` + `rope_scaling` (old), and `rope_parameters` (transformers 5), which one family
nests by layer type. Papers: linear (arXiv 2306.15595), YaRN (2309.00071), LongRoPE (2402.13753).
"""

import math

from ..errors import ConfigError, UnsupportedModel
from .archs import Arch
from .fields import DAMAGED, Fields, shown
from .spec import RopeSpec

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_BY_KIND = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        "factor",
        "attention_factor",
        "attn_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
# A key that no kind knows is more likely a variant with other frequencies than noise, so it is refused.
_KNOWN = _ALWAYS.union(*_BY_KIND.values()) | {"finetuned"}


def parse_ropes(config: Fields, arch: Arch, *, head_dim: int, context: int) -> tuple[RopeSpec, RopeSpec]:
    """The ropes of layers with full attention and of layers with a window; the same one in most families.

    Raises UnsupportedModel for a kind or key that is not known, ConfigError for values out of range.
    """
    reader = _Reader(config, arch, head_dim, context)
    scaling = config.child("rope_scaling")
    parameters = config.child("rope_parameters")
    nested = parameters is not None and (FULL in parameters.values or SLIDING in parameters.values)
    theta = config.number("rope_theta", arch.rope_theta)
    if arch.local_rope_theta is None:
        if nested:
            raise UnsupportedModel(
                f"{config.where}: rope_parameters differ by layer type, which {arch.hf} does not have",
                hint="the architecture named in config.json is not the one the file describes",
            )
        rope = reader.rope(_merged(parameters, scaling), theta)
        return rope, rope
    if parameters is not None and not nested:
        raise ConfigError(
            f'{parameters.where}: must have "{FULL}" and "{SLIDING}" for {arch.hf}, has {", ".join(parameters.values)}',
            hint=DAMAGED,
        )
    full = _merged(parameters.child(FULL) if parameters else None, scaling)
    sliding = parameters.child(SLIDING) if parameters else None
    local_theta = config.number("rope_local_base_freq", arch.local_rope_theta)
    return reader.rope(full, theta, nested=True), reader.rope(sliding, local_theta, nested=True)


def _merged(parameters: Fields | None, scaling: Fields | None) -> Fields | None:
    """One dictionary out of the two spellings; they may repeat, but not contradict each other."""
    if parameters is None or scaling is None:
        return scaling or parameters
    for key in parameters.values.keys() & scaling.values.keys():
        if parameters.values[key] != scaling.values[key]:
            raise ConfigError(
                f'{parameters.where} and {scaling.where} disagree on "{key}": '
                f"{shown(parameters.values[key])} and {shown(scaling.values[key])}",
                hint="remove the one that is wrong",
            )
    return Fields({**parameters.values, **scaling.values}, scaling.where)


class _Reader:
    """Reads rope dictionaries of one model."""

    def __init__(self, config: Fields, arch: Arch, head_dim: int, context: int) -> None:
        self.config = config
        self.arch = arch
        self.head_dim = head_dim
        self.context = context

    def rope(self, rope: Fields | None, theta: float, *, nested: bool = False) -> RopeSpec:
        """One dictionary (None: the plain rope) with the base that holds where it names none."""
        rope = rope or Fields({}, self.config.where)
        kind = self.kind(rope)
        if unknown := sorted(key for key in rope.values if key not in _KNOWN and rope.has(key)):
            raise UnsupportedModel(
                f'{rope.where}: "{unknown[0]}" = {shown(rope.values[unknown[0]])} is not supported (rope kind {kind})',
                hint="this model rotates its keys in a way this version does not know",
            )
        theta = rope.number("rope_theta", theta)
        dim = self.rotary_dim(rope)
        if kind == "default":
            return RopeSpec(kind=kind, theta=theta, rotary_dim=dim)
        if kind == "linear":
            return RopeSpec(kind=kind, theta=theta, rotary_dim=dim, factor=rope.number("factor"))
        if kind == "dynamic":
            if dim <= 2:
                raise ConfigError(f"{rope.where}: a dynamic rope needs more than 2 rotating dimensions, has {dim}")
            # Trained on max_position_embeddings, whatever else the dictionary says (as transformers has it).
            return RopeSpec(
                kind=kind, theta=theta, rotary_dim=dim, factor=rope.number("factor"), original_context=self.context
            )
        original = self.original_context(rope, nested)
        scaled = {"llama3": self.llama3, "yarn": self.yarn, "longrope": self.longrope}[kind]
        return scaled(rope, theta, dim, original)

    def kind(self, rope: Fields) -> str:
        named = "rope_type" if rope.has("rope_type") else "type"
        if not rope.has(named):
            stated = {key for key in rope.values if rope.has(key)}
            if extra := sorted(stated - {"rope_theta", "partial_rotary_factor"}):
                raise ConfigError(f'{rope.where}: has "{extra[0]}", but no "rope_type"', hint=DAMAGED)
            return "default"
        kind = rope.text(named)
        if kind in self.arch.longrope_names:
            return "longrope"
        if kind not in KINDS:
            raise UnsupportedModel(
                f'{rope.where}: rope kind "{kind}" is not supported', hint=f"supported: {', '.join(KINDS)}"
            )
        return kind

    def rotary_dim(self, rope: Fields) -> int:
        owner = rope if rope.has("partial_rotary_factor") else self.config
        part = owner.number("partial_rotary_factor", 1.0)
        if part > 1.0:
            raise owner.error("partial_rotary_factor", "greater than 0 and at most 1")
        if part != 1.0 and not self.arch.partial_rotary:
            raise UnsupportedModel(
                f'{owner.where}: "partial_rotary_factor" = {part:g} is not supported for {self.arch.hf}'
            )
        dim = int(self.head_dim * part)
        if dim < 2 or dim % 2:
            raise ConfigError(
                f"{owner.where}: {dim} of {self.head_dim} dimensions of a head rotate; must be even and > 0"
            )
        return dim

    def original_context(self, rope: Fields, nested: bool) -> int:
        """The key stands in config.json itself (it wins, as in transformers) or in the dictionary."""
        key = "original_max_position_embeddings"
        owner = self.config if self.config.has(key) and not nested else rope
        return owner.integer(key, self.arch.original_context or self.context, low=2)

    def llama3(self, rope: Fields, theta: float, dim: int, original: int) -> RopeSpec:
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", f"greater than low_freq_factor ({low:g})")
        return RopeSpec(
            kind="llama3",
            theta=theta,
            rotary_dim=dim,
            factor=rope.number("factor"),
            original_context=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )

    def yarn(self, rope: Fields, theta: float, dim: int, original: int) -> RopeSpec:
        if theta <= 1.0:
            raise ConfigError(f'{rope.where}: "rope_theta" must be greater than 1 for yarn, is {theta:g}', hint=DAMAGED)
        factor = rope.number("factor", self.context / original)
        # 0 stands for "not given" in these four, as in transformers.
        fast, slow, mscale, mscale_all = (
            rope.number(key, default) if rope.values.get(key) not in (None, 0) else default
            for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0), ("mscale", 0.0), ("mscale_all_dim", 0.0))
        )
        if fast < slow:
            raise rope.error("beta_fast", f"at least beta_slow ({slow:g})")
        if rope.has("attention_factor"):
            attention = rope.number("attention_factor")
        elif mscale and mscale_all:
            attention = _temperature(factor, mscale) / _temperature(factor, mscale_all)
        else:
            # The key of YaRN's authors, a multiplier of the default. Published models use it to undo the default;
            # transformers leaves it aside, which would scale every score of such a model by a wrong constant.
            attention = _temperature(factor, 1.0) * rope.number("attn_factor", 1.0)
        return RopeSpec(
            kind="yarn",
            theta=theta,
            rotary_dim=dim,
            factor=factor,
            original_context=original,
            attention_factor=attention,
            beta_fast=fast,
            beta_slow=slow,
            truncate=rope.flag("truncate", True),
        )

    def longrope(self, rope: Fields, theta: float, dim: int, original: int) -> RopeSpec:
        factor = rope.number("factor", self.context / original)
        if rope.has("attention_factor"):
            attention = rope.number("attention_factor")
        else:
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
        return RopeSpec(
            kind="longrope",
            theta=theta,
            rotary_dim=dim,
            original_context=original,
            attention_factor=attention,
            short_factor=rope.numbers("short_factor", dim // 2),
            long_factor=rope.numbers("long_factor", dim // 2),
        )


def _temperature(factor: float, weight: float) -> float:
    """YaRN's scale of queries and keys for a context stretched by `factor`."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
