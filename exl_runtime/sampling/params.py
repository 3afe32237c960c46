"""`SamplingParams`: everything a caller may set about how tokens are chosen, checked when it is made.

Data only: torch-free, no logits, no text beyond the strings that break DRY matches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from typing_extensions import Self

from ..errors import UsageError
from . import order as steps
from . import rules
from .rules import real, whole

_OFF_AT_ONE = "1 turns it off"

_ALIASES = {  # how other programs call the same thing; only used to name the right one in an error
    "temp": "temperature",
    "typ_p": "typical_p",
    "typical": "typical_p",
    "tfs_z": "tfs",
    "repeat_penalty": "repetition_penalty",
    "rep_pen": "repetition_penalty",
    "repeat_last_n": "penalty_range",
    "penalty_last_n": "penalty_range",
    "repetition_decay": "penalty_decay",
    "mirostat_mode": "mirostat",
    "bad_words_ids": "banned_tokens",
    "allowed_token_ids": "allowed_tokens",
    "ban_eos_token": "ignore_eos",
    "samplers": "order",
    "top_logprobs": "logprobs",
    "dry_penalty_last_n": "dry_range",
    "random_seed": "seed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Everything but `temperature` and `min_p` is off by default.

    Steps run in the order of `order.DEFAULT_ORDER` unless `order` says otherwise (see there: a partial list only
    permutes the steps it names). Bans and allowed tokens always come first: no order can bring back a banned token.
    The history that penalties look at is prompt and reply together. Raises UsageError naming the parameter, the
    value and the allowed range; NaN is refused everywhere.
    """

    temperature: float = real(0.8, 0, 100)
    """Divides the logits. Below 0.001: no draw, the best token after masks and penalties (greedy)."""
    temperature_last: bool = False
    """Cut on the model's own distribution, and apply the temperature to what is left."""
    min_temp: float = real(0.0, 0, 100)
    max_temp: float = real(0.0, 0, 100)
    """max_temp > min_temp: the temperature moves between them with the entropy; `temperature` is then not used."""
    temp_exponent: float = real(1.0, 0, 10, above=True)
    smoothing_factor: float = real(0.0, 0, 100)
    smoothing_curve: float = real(1.0, 1, 10)

    top_k: int = whole(0, 0, hint="0 turns it off")
    top_p: float = real(1.0, 0, 1, above=True, hint=_OFF_AT_ONE)
    min_p: float = real(0.05, 0, 1)
    top_a: float = real(0.0, 0, 1)
    typical_p: float = real(1.0, 0, 1, above=True, hint=_OFF_AT_ONE)
    tfs: float = real(1.0, 0, 1, above=True, hint=_OFF_AT_ONE)
    epsilon_cutoff: float = real(0.0, 0, 1)
    eta_cutoff: float = real(0.0, 0, 1)
    top_n_sigma: float = real(0.0, 0, 1000, hint="0 turns it off")
    min_keep: int = whole(1, 1)
    """Every cut leaves at least this many tokens."""

    xtc_probability: float = real(0.0, 0, 1)
    xtc_threshold: float = real(0.1, 0, 1)
    xtc_exempt_tokens: tuple[int, ...] = ()
    """Ids that XTC neither removes nor counts (end tokens, newline)."""

    repetition_penalty: float = real(1.0, 0, 10, above=True, hint=_OFF_AT_ONE)
    frequency_penalty: float = real(0.0, -10, 10)
    presence_penalty: float = real(0.0, -10, 10)
    penalty_range: int = whole(-1, -1, hint="-1 means all tokens")
    """How many of the latest tokens count in full."""
    penalty_decay: int = whole(0, 0)
    """Over how many tokens before those the three penalties fade to nothing."""

    dry_multiplier: float = real(0.0, 0, 100)
    dry_base: float = real(1.75, 1, 100)
    dry_allowed_length: int = whole(2, 0)
    dry_range: int = whole(0, -1)
    """How many of the latest tokens are searched; 0 and -1: all."""
    dry_max_ngram: int = whole(20, 1, 1000)
    """The longest repetition that is measured."""
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Matches never run across a token that contains one of these; the Sampler is given the ids."""
    no_repeat_ngram_size: int = whole(0, 0)

    mirostat: int = whole(0, 0, 2, hint="0 is off, 1 and 2 are the versions")
    mirostat_tau: float = real(5.0, 0, 100)
    """Target surprise in bits."""
    mirostat_eta: float = real(0.1, 0, 10)
    adaptive_target: float = real(-1.0, 0, 1, also=(-1.0,), hint="-1 turns it off")
    """Probability that the drawn tokens shall have on average."""
    adaptive_decay: float = real(0.9, 0, 0.99)
    skew: float = real(0.0, -10, 10)
    """Above 0 the draw leans to less likely tokens, below 0 to likelier ones."""

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits; -inf bans."""
    banned_tokens: tuple[int, ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    """None: all."""
    min_tokens: int = whole(0, 0)
    """End tokens are banned until the reply has this many tokens."""
    ignore_eos: bool = False
    """End tokens are banned throughout."""

    logprobs: int = whole(0, 0)
    """0: none. n: log-probability of the drawn token and of the n best, of the model's own distribution."""
    seed: int | None = whole(None, 0, 2**64 - 1, optional=True, hint="leave it out for a random one")
    order: tuple[str, ...] = ()
    """Step names; those named here trade places among themselves. Empty: the default order."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            rule = spec.metadata.get("rule")
            if rule is not None and not (value is None and spec.metadata.get("optional")):
                object.__setattr__(self, spec.name, rule.check(spec.name, value))
        for name in ("temperature_last", "ignore_eos"):
            rules.check_flag(name, getattr(self, name))
        for name in ("banned_tokens", "xtc_exempt_tokens"):
            object.__setattr__(self, name, rules.check_ids(name, getattr(self, name)))
        breakers = rules.check_strings("dry_sequence_breakers", self.dry_sequence_breakers)
        object.__setattr__(self, "dry_sequence_breakers", breakers)
        object.__setattr__(self, "logit_bias", rules.check_bias("logit_bias", self.logit_bias))
        object.__setattr__(self, "order", steps.check_order(self.order))
        self._check_allowed()
        self._check_together()

    def _check_allowed(self) -> None:
        if self.allowed_tokens is None:
            return
        allowed = rules.check_ids("allowed_tokens", self.allowed_tokens)
        object.__setattr__(self, "allowed_tokens", allowed)
        if not allowed:
            raise UsageError("allowed_tokens is empty: no token could be chosen", hint="leave it out to allow all")
        if set(allowed) <= set(self.banned_tokens):
            raise UsageError(
                "banned_tokens removes every token of allowed_tokens", hint="take one of them out of banned_tokens"
            )

    def _check_together(self) -> None:
        if self.max_temp < self.min_temp:
            raise UsageError(
                f"max_temp is {self.max_temp:g}, below min_temp {self.min_temp:g}",
                hint="set max_temp above min_temp, or both to 0 for a fixed temperature",
            )
        if self.temperature_last and "temperature" in self.order:
            raise UsageError(
                "temperature_last and order both place the temperature", hint="use one of the two, not both"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From a parsed JSON object; an unknown name is a UsageError that offers the nearest one."""
        if not isinstance(values, Mapping):
            raise UsageError(f"sampling parameters must be an object of names and values, got {values!r}")
        names = [spec.name for spec in fields(cls)]
        for name in values:
            if name not in names:
                key = str(name).lower().replace("-", "_")
                near = [_ALIASES[key]] if key in _ALIASES else get_close_matches(key, names, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
                raise UsageError(f"there is no sampling parameter {name!r}", hint=hint)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every parameter as plain Python (lists, dicts, numbers); `from_dict` gives back an equal object."""
        plain = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            plain[spec.name] = value
        return plain

    @property
    def greedy(self) -> bool:
        """True if the best token is taken instead of a draw."""
        return steps.is_greedy(self)

    def effective_chain(self) -> list[str]:
        """The steps that do something, in the order they run, in words; the last line is the choice itself."""
        return steps.describe(self)
