"""The steps of the pipeline: their names, their order, when each does something, and how to say so to a person.

Knows parameters only: no logits, no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from .params import SamplingParams

GREEDY_BELOW = 1e-3
"""A temperature under this takes the best token: at 0.001 a lead of 0.1 logits already means odds of e^100 to 1."""


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One step: when it does something, and what to call it. `picks`: it serves the random draw, so greedy skips it."""

    name: str
    active: Callable[[SamplingParams], bool]
    describe: Callable[[SamplingParams], str]
    picks: bool = True


def _penalties_text(p: SamplingParams) -> str:
    parts = [f"repetition_penalty {p.repetition_penalty:g}"] if p.repetition_penalty != 1 else []
    parts += [f"frequency_penalty {p.frequency_penalty:g}"] if p.frequency_penalty != 0 else []
    parts += [f"presence_penalty {p.presence_penalty:g}"] if p.presence_penalty != 0 else []
    reach = "all tokens" if p.penalty_range < 0 else f"the last {p.penalty_range} tokens"
    fade = f", fading over {p.penalty_decay} more" if p.penalty_decay and p.penalty_range >= 0 else ""
    return f"{', '.join(parts)} ({reach}{fade})"


def _temperature_text(p: SamplingParams) -> str:
    if is_dynamic(p):
        return f"temperature {p.min_temp:g} to {p.max_temp:g} by entropy (exponent {p.temp_exponent:g})"
    return f"temperature {p.temperature:g}"


def is_dynamic(p: SamplingParams) -> bool:
    """True if the temperature follows the entropy between min_temp and max_temp."""
    return p.max_temp > p.min_temp


def is_greedy(p: SamplingParams) -> bool:
    """True if the best token is taken instead of a draw; this wins over a dynamic temperature."""
    return p.temperature < GREEDY_BELOW


def _penalises(p: SamplingParams) -> bool:
    does = p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
    return does and (p.penalty_range != 0 or p.penalty_decay > 0)


STEPS: tuple[StepInfo, ...] = (
    StepInfo("logit_bias", lambda p: bool(p.logit_bias), lambda p: f"logit_bias on {len(p.logit_bias)} tokens", False),
    StepInfo("penalties", _penalises, _penalties_text, False),
    StepInfo(
        "dry",
        lambda p: p.dry_multiplier > 0,
        lambda p: f"dry {p.dry_multiplier:g} * {p.dry_base:g} ^ (length - {p.dry_allowed_length})",
        False,
    ),
    StepInfo(
        "no_repeat_ngram",
        lambda p: p.no_repeat_ngram_size > 0,
        lambda p: f"no_repeat_ngram_size {p.no_repeat_ngram_size}",
        False,
    ),
    StepInfo("temperature", lambda p: is_dynamic(p) or p.temperature != 1, _temperature_text),
    StepInfo(
        "smoothing",
        lambda p: p.smoothing_factor > 0,
        lambda p: f"smoothing_factor {p.smoothing_factor:g} (curve {p.smoothing_curve:g})",
    ),
    StepInfo("top_n_sigma", lambda p: p.top_n_sigma > 0, lambda p: f"top_n_sigma {p.top_n_sigma:g}"),
    StepInfo("top_k", lambda p: p.top_k > 0, lambda p: f"top_k {p.top_k}"),
    StepInfo("typical_p", lambda p: p.typical_p < 1, lambda p: f"typical_p {p.typical_p:g}"),
    StepInfo("tfs", lambda p: p.tfs < 1, lambda p: f"tfs {p.tfs:g}"),
    StepInfo("top_a", lambda p: p.top_a > 0, lambda p: f"top_a {p.top_a:g}"),
    StepInfo("top_p", lambda p: p.top_p < 1, lambda p: f"top_p {p.top_p:g}"),
    StepInfo("min_p", lambda p: p.min_p > 0, lambda p: f"min_p {p.min_p:g}"),
    StepInfo("epsilon_cutoff", lambda p: p.epsilon_cutoff > 0, lambda p: f"epsilon_cutoff {p.epsilon_cutoff:g}"),
    StepInfo("eta_cutoff", lambda p: p.eta_cutoff > 0, lambda p: f"eta_cutoff {p.eta_cutoff:g}"),
    StepInfo(
        "xtc",
        lambda p: p.xtc_probability > 0 and p.xtc_threshold <= 0.5,  # two tokens cannot both exceed one half
        lambda p: f"xtc with probability {p.xtc_probability:g} above {p.xtc_threshold:g}",
    ),
    StepInfo(
        "mirostat",
        lambda p: p.mirostat > 0,
        lambda p: f"mirostat {p.mirostat} (tau {p.mirostat_tau:g}, eta {p.mirostat_eta:g})",
    ),
    StepInfo(
        "adaptive_p",
        lambda p: p.adaptive_target >= 0,
        lambda p: f"adaptive_p towards {p.adaptive_target:g} (decay {p.adaptive_decay:g})",
    ),
    StepInfo("skew", lambda p: p.skew != 0, lambda p: f"skew {p.skew:g}"),
)

DEFAULT_ORDER: tuple[str, ...] = tuple(step.name for step in STEPS)
_BY_NAME = {step.name: step for step in STEPS}
_AT_THE_END = {"mirostat", "adaptive_p", "skew"}


def check_order(value: object) -> tuple[str, ...]:
    """Step names, each known and at most once; UsageError otherwise."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise UsageError(f"order must be a list of step names, got {value!r}", hint=f"the steps: {_all_names()}")
    names = tuple(value)
    for position, name in enumerate(names):
        if name not in _BY_NAME:
            near = get_close_matches(str(name), DEFAULT_ORDER, n=1, cutoff=0.4)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"order: there is no step {name!r}", hint=f"{meant}the steps: {_all_names()}")
        if name in names[:position]:
            raise UsageError(f"order: the step {name!r} is named twice", hint="name each step at most once")
    return names


def resolve_order(p: SamplingParams) -> tuple[str, ...]:
    """All step names in the order they run.

    The named steps share out among themselves the places they have in the default order, so a short list such as
    ("min_p", "temperature") swaps those two and drops or moves nothing else. `temperature_last` then moves the
    temperature behind every cut, before mirostat, adaptive_p and skew, which shape the final draw.
    """
    wanted = iter(p.order)
    names = [next(wanted) if name in p.order else name for name in DEFAULT_ORDER]
    if p.temperature_last:
        names.remove("temperature")
        last_cut = max(i for i, name in enumerate(names) if name not in _AT_THE_END)
        names.insert(last_cut + 1, "temperature")
    return tuple(names)


def active_steps(p: SamplingParams) -> tuple[str, ...]:
    """Names of the steps that do something, in order; a greedy choice skips those that only serve the draw."""
    greedy = is_greedy(p)
    steps = (_BY_NAME[name] for name in resolve_order(p))
    return tuple(step.name for step in steps if step.active(p) and not (greedy and step.picks))


def describe(p: SamplingParams) -> list[str]:
    """What happens to the logits, one line a step, masks first and the choice last."""
    lines = []
    if p.allowed_tokens is not None:
        lines.append(f"allow only {len(p.allowed_tokens)} tokens")
    if p.banned_tokens:
        lines.append(f"ban {len(p.banned_tokens)} tokens")
    if p.ignore_eos:
        lines.append("ban the end tokens (ignore_eos)")
    elif p.min_tokens:
        lines.append(f"ban the end tokens for the first {p.min_tokens} tokens (min_tokens)")
    lines += [_BY_NAME[name].describe(p) for name in active_steps(p)]
    if is_greedy(p):
        lines.append("take the best token (greedy)")
    else:
        lines.append("draw" if p.seed is None else f"draw (seed {p.seed})")
    return lines


def _all_names() -> str:
    return ", ".join(DEFAULT_ORDER)
