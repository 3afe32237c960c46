"""From parameters to steps: `build_pipeline` makes a tuple of the steps that do something, in their order.

Binds what the parameters say to the functions of this room; holds no numbers of its own.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from . import feedback, masks, penalties, ranked, transforms
from .order import active_steps, is_dynamic
from .params import SamplingParams
from .random import COIN, uniform
from .transforms import REMOVED, Logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a step may know beside the logits.

    history  the tokens so far, int64 (tokens,); empty when no step of the pipeline looks back
    index    the number of tokens generated so far
    """

    history: penalties.Tokens
    index: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """One step: float32 logits -> float32 logits of the same shape, -inf is "removed".

    by_id     needs the whole vocabulary in place; the others may be given the remaining tokens only, in index order
    cuts      removes tokens, so that it may pay to go on with the remaining ones
    looks_back  uses `Turn.history`
    observer  wants to hear which token was drawn
    """

    name: str
    run: Callable[[Logits, Turn], Logits]
    by_id: bool = False
    cuts: bool = False
    looks_back: bool = False
    observer: feedback.Mirostat | feedback.AdaptiveP | None = None


def build_pipeline(
    params: SamplingParams,
    *,
    vocab_size: int,
    eos_ids: Set[int] | None = None,
    dry_breaker_ids: Set[int] = frozenset(),
) -> tuple[Transform, ...]:
    """Only the steps that do something, masks first. The choice itself (draw or best token) is not among them.

    vocab_size  length of the rows of logits
    eos_ids     end tokens, for min_tokens and ignore_eos; None: not known, and then those two are refused
    Every call makes fresh state for mirostat and adaptive-p. Raises UsageError for token ids outside the vocabulary.
    """
    makers = {**_value_steps(params, vocab_size), **_id_steps(params, vocab_size, dry_breaker_ids)}
    steps = [makers[name]() for name in active_steps(params)]
    mask = _mask_step(params, vocab_size, eos_ids)
    return tuple(steps) if mask is None else (mask, *steps)


def _value_steps(p: SamplingParams, vocab_size: int) -> dict[str, Callable[[], Transform]]:
    keep = p.min_keep
    cuts: dict[str, Callable[[Logits], Logits]] = {
        "top_n_sigma": lambda x: transforms.top_n_sigma(x, p.top_n_sigma, keep),
        "top_k": lambda x: ranked.top_k(x, p.top_k, keep),
        "typical_p": lambda x: ranked.typical(x, p.typical_p, keep),
        "tfs": lambda x: ranked.tail_free(x, p.tfs, keep),
        "top_a": lambda x: transforms.top_a(x, p.top_a, keep),
        "top_p": lambda x: ranked.top_p(x, p.top_p, keep),
        "min_p": lambda x: transforms.min_p(x, p.min_p, keep),
        "epsilon_cutoff": lambda x: transforms.epsilon_cutoff(x, p.epsilon_cutoff, keep),
        "eta_cutoff": lambda x: transforms.eta_cutoff(x, p.eta_cutoff, keep),
    }
    shapes: dict[str, Callable[[Logits], Logits]] = {
        "temperature": (
            (lambda x: transforms.dynamic_temperature(x, p.min_temp, p.max_temp, p.temp_exponent))
            if is_dynamic(p)
            else (lambda x: transforms.temperature(x, p.temperature))
        ),
        "smoothing": lambda x: transforms.smoothing(x, p.smoothing_factor, p.smoothing_curve),
        "skew": lambda x: ranked.skew(x, p.skew),
    }
    makers = {name: _maker(name, function, cuts=True) for name, function in cuts.items()}
    makers |= {name: _maker(name, function, cuts=False) for name, function in shapes.items()}

    def mirostat() -> Transform:
        state = feedback.Mirostat(version=p.mirostat, tau=p.mirostat_tau, eta=p.mirostat_eta, vocab_size=vocab_size)
        return Transform(name="mirostat", run=lambda x, _: state(x), cuts=True, observer=state)

    def adaptive() -> Transform:
        state = feedback.AdaptiveP(target=p.adaptive_target, decay=p.adaptive_decay)
        return Transform(name="adaptive_p", run=lambda x, _: state(x), observer=state)

    return {**makers, "mirostat": mirostat, "adaptive_p": adaptive}


def _maker(name: str, function: Callable[[Logits], Logits], *, cuts: bool) -> Callable[[], Transform]:
    return lambda: Transform(name=name, run=lambda x, _: function(x), cuts=cuts)


def _id_steps(p: SamplingParams, vocab_size: int, dry_breaker_ids: Set[int]) -> dict[str, Callable[[], Transform]]:
    def bias() -> Transform:
        pairs = {token: amount for token, amount in p.logit_bias.items() if amount > -np.inf}
        ids = _ids("logit_bias", pairs, vocab_size)
        amounts = np.array([*pairs.values()], dtype=np.float32)
        return Transform(name="logit_bias", run=lambda x, _: masks.bias(x, ids, amounts), by_id=True)

    def classic() -> Transform:
        def run(x: Logits, turn: Turn) -> Logits:
            return penalties.repetition_frequency_presence(
                x,
                turn.history,
                repetition=p.repetition_penalty,
                frequency=p.frequency_penalty,
                presence=p.presence_penalty,
                reach=p.penalty_range,
                decay=p.penalty_decay,
            )

        return Transform(name="penalties", run=run, by_id=True, looks_back=True)

    def dry() -> Transform:
        breakers = np.zeros(vocab_size + 1, dtype=np.bool_)
        breakers[[token for token in dry_breaker_ids if 0 <= token < vocab_size]] = True

        def run(x: Logits, turn: Turn) -> Logits:
            return penalties.dry(
                x,
                turn.history,
                multiplier=p.dry_multiplier,
                base=p.dry_base,
                allowed_length=p.dry_allowed_length,
                max_ngram=p.dry_max_ngram,
                reach=p.dry_range,
                breakers=breakers,
            )

        return Transform(name="dry", run=run, by_id=True, looks_back=True)

    def ngram() -> Transform:
        def run(x: Logits, turn: Turn) -> Logits:
            return penalties.no_repeat_ngram(x, turn.history, p.no_repeat_ngram_size)

        return Transform(name="no_repeat_ngram", run=run, by_id=True, looks_back=True)

    def xtc() -> Transform:
        exempt = None
        if p.xtc_exempt_tokens:
            exempt = np.zeros(vocab_size, dtype=np.bool_)
            exempt[_ids("xtc_exempt_tokens", p.xtc_exempt_tokens, vocab_size)] = True

        def run(x: Logits, turn: Turn) -> Logits:
            if uniform(turn.seed, turn.index, COIN) >= p.xtc_probability:
                return x
            return transforms.xtc(x, p.xtc_threshold, p.min_keep, exempt)

        return Transform(name="xtc", run=run, by_id=exempt is not None, cuts=True)

    return {"logit_bias": bias, "penalties": classic, "dry": dry, "no_repeat_ngram": ngram, "xtc": xtc}


def never_chosen(p: SamplingParams, vocab_size: int, eos_ids: Set[int] | None) -> tuple[set[int], set[int]]:
    """Ids that must not be chosen: ever, and before `p.min_tokens` tokens are there. The allowed ones are not asked."""
    eos = {token for token in eos_ids or () if 0 <= token < vocab_size}
    vetoed = {token for token, amount in p.logit_bias.items() if amount == -np.inf}
    always = {*p.banned_tokens, *vetoed, *(eos if p.ignore_eos else ())}
    return always, always | eos if p.min_tokens else always


def _mask_step(p: SamplingParams, vocab_size: int, eos_ids: Set[int] | None) -> Transform | None:
    """What must never be chosen, whatever the order of the other steps. None: nothing is."""
    if eos_ids is None and (p.min_tokens or p.ignore_eos):
        name = "ignore_eos" if p.ignore_eos else "min_tokens"
        raise UsageError(f"{name} is set, but the end tokens are not known", hint="pass eos_ids, or leave it out")
    eos = {token for token in eos_ids or () if 0 <= token < vocab_size}
    vetoed = [token for token, amount in p.logit_bias.items() if amount == -np.inf]
    always, early = never_chosen(p, vocab_size, eos_ids)
    named = {"banned_tokens": p.banned_tokens, "logit_bias": vetoed, "allowed_tokens": p.allowed_tokens}
    for name, tokens in named.items():
        _ids(name, tokens or (), vocab_size)
    if p.allowed_tokens is None and not early:
        return None
    allowed = None if p.allowed_tokens is None else _ids("allowed_tokens", p.allowed_tokens, vocab_size)
    ids_always, ids_early = (np.array(sorted(ids), dtype=np.int64) for ids in (always, early))
    named["min_tokens" if p.min_tokens else "ignore_eos"] = (*eos,) if p.min_tokens or p.ignore_eos else ()
    at_work = ", ".join(name for name, tokens in named.items() if tokens)

    def run(x: Logits, turn: Turn) -> Logits:
        if allowed is not None:
            x = masks.allow_only(x, allowed)
        x = masks.ban(x, ids_early if turn.index < p.min_tokens else ids_always)
        if x.max() == REMOVED:
            raise UsageError(
                f"no token may be chosen: together these exclude all {x.size}: {at_work}", hint="loosen one of them"
            )
        return x

    return Transform(name="masks", run=run, by_id=True, cuts=allowed is not None)


def _ids(name: str, tokens: object, vocab_size: int) -> masks.Ids:
    ids = np.array([*tokens], dtype=object)  # type: ignore[misc]
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UsageError(
                f"{name}: there is no token {token}", hint=f"this model has the tokens 0 to {vocab_size - 1}"
            )
    return ids.astype(np.int64)
