"""Which variant of a model, with which cache and how much context, for a given memory.

Memory is that of `exl info` (model/placement.py): weights as stored, the cache of the context, and working memory.

The rules, in this order; `RULES` says them to the user:
1. The context is at least what was asked for, and no longer than the model was made for. What is spare after the choice
   may lengthen it, never decide it.
2. With a saved measurement of all variants, the one that loses least is the best: its KL divergence from the source
   with that cache, or with a cache of 16 bits or more and an allowance for the smaller one (`ALLOWANCE`; measured by
   `eval cache` where that was saved too).
3. Without one, bits per weight of the layers stand for quality. A q8 cache costs less than a step of the weights, so
   the largest variant that fits with it wins; a q6 cache is taken before going below 4 bits per weight; q4 before
   going below 3.
4. Of what is equal by that, the cache with more bits, then what needs less memory.
Different models in one folder are chosen from separately: neither measure compares them.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exl_runtime.cache.geometry import PAGE_SIZE
from exl_runtime.errors import EvalError, ExlError, UsageError

from .saved import SavedSet

if TYPE_CHECKING:
    from exl_runtime.model.summary import ModelSummary

# KL in nats that a cache type adds where nothing was measured: coarse, and only there to be larger than what a cache of
# that size usually costs. q8: 0.0008 in https://github.com/ggml-org/llama.cpp/pull/7412 (q8_0 for keys and values).
ALLOWANCE = {"q8": 0.001, "q6": 0.003, "q4": 0.015}
RULES = (
    "never less context than asked for, never more than the model was made for",
    "measured: least KL divergence, of the weights and of the cache together",
    "not measured: most bits per weight; a q8 cache is always worth a larger variant, q6 before going below 4 bits "
    "per weight, q4 before going below 3",
    "then the cache with more bits, then less memory",
)
Memory = Callable[[Path, int, str], int]  # (folder, context, cache) -> bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One model folder. `kl`: cache type -> measured KL; {} when there is no measurement for it."""

    folder: Path
    summary: "ModelSummary"
    kl: Mapping[str, float]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.summary.name

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for variants of one model, as far as headers tell: architecture and shape of the layers."""
        kinds = {(kind.kind, kind.matrices, kind.weights) for kind in self.summary.kinds}
        layers = sorted(kind for kind in kinds if kind[0] not in ("embedding", "head"))
        return (self.summary.architecture, self.summary.context_length, *layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A variant with a cache type. `needed`: bytes with the context that was asked for. `loss`: KL, or None."""

    variant: Variant
    cache: str
    needed: int
    loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to do about one model.

    best      the option to take; None when none fits
    longest   tokens of context that fit with `best`, or with `nearest` when nothing fits; 0: not even one cache page
    nearest   the option that needs least, whether it fits or not
    options   all, best first: those that fit, then those that do not by what they need
    measure   "kl" | "bits"     why   what the measure is from, or why there is none
    """

    best: Option | None
    longest: int
    nearest: Option
    options: tuple[Option, ...]
    measure: str
    why: str
    budget: int
    context: int

    @property
    def fitting(self) -> tuple[Option, ...]:
        """Those within the budget."""
        return tuple(option for option in self.options if option.needed <= self.budget)


def cache_bits(cache: str) -> int:
    """Of one key or value: 32 for "fp32", 16 for "bf16", 8 for "q8". Raises UsageError for "auto" and the like."""
    digits = cache.lstrip("abcdefghijklmnopqrstuvwxyz")
    if not digits.isdigit():
        raise UsageError(f"cache type {cache!r} has no number of bits", hint="give types such as fp16 or q8")
    return int(digits)


def default_caches(known: Sequence[str]) -> tuple[str, ...]:
    """What is worth a thought: fp16 and the quantized types. More than 16 bits buy nothing that can be measured."""
    return tuple(cache for cache in known if cache == "fp16" or cache.startswith("q"))


def find_variants(folder: Path) -> tuple[list[tuple[Path, "ModelSummary"]], list[tuple[Path, str]]]:
    """The models in `folder` (or the one that it is), and folders with a config.json that cannot be used, with reasons.

    Raises EvalError when there is no usable model.
    """
    from exl_runtime.model.summary import summarize

    try:
        inside = sorted(child for child in folder.iterdir() if (child / "config.json").is_file())
    except OSError as err:
        raise EvalError(f"{folder}: cannot be read: {err.strerror or err}", hint="give a folder of models") from err
    places = [folder] if (folder / "config.json").is_file() else inside
    found, skipped = [], []
    for place in places:
        try:
            found.append((place, summarize(place)))
        except ExlError as err:
            skipped.append((place, err.problem))
    if not found:
        why = f": {skipped[0][1]}" if skipped else ""
        raise EvalError(
            f"{folder}: no usable model in it{why}",
            hint="give the folder whose subfolders are models, each with config.json and *.safetensors",
        )
    return found, skipped


def group(variants: Iterable[Variant]) -> list[list[Variant]]:
    """Variants of one model together; the largest model first."""
    groups: dict[tuple[object, ...], list[Variant]] = {}
    for variant in variants:
        groups.setdefault(variant.identity, []).append(variant)
    return sorted(groups.values(), key=lambda found: -max(variant.summary.parameters for variant in found))


def with_measurements(
    found: Sequence[tuple[Path, "ModelSummary"]], sets: Sequence[SavedSet]
) -> tuple[list[Variant], str, Mapping[str, float]]:
    """The variants of one model with their divergences, the text that says where from, and allowances measured.

    The first of `sets` that knows every quantized variant serves; unquantized weights are at 0 unless it says more.
    """
    allowance = dict(_measured_allowance(found, [one for one in sets if one.own]))
    missing: list[str] = []
    for one in (one for one in sets if not one.own):
        kls = {folder: one.of(folder, summary.file_bytes) for folder, summary in found}
        missing = [s.name for folder, s in found if not kls[folder] and s.format != "dense"]
        if not any(kls.values()):
            missing = []
        elif not missing:
            variants = [
                Variant(folder=folder, summary=summary, kl=kls[folder] or {"fp16": 0.0}) for folder, summary in found
            ]
            return variants, f"{one.label} ({one.origin})", allowance
    bare = [Variant(folder=folder, summary=summary, kl={}) for folder, summary in found]
    if missing:
        return bare, f"no measurement of {', '.join(missing)}, so bits per weight for all", allowance
    return bare, "no saved measurement of these variants", allowance


def choose(
    variants: Sequence[Variant],
    caches: Sequence[str],
    *,
    budget: int,
    context: int,
    memory: Memory,
    why: str = "",
    allowance: Mapping[str, float] | None = None,
) -> Choice:
    """The best of variants of one model with these cache types, by the rules at the top of this file.

    Variants that were made for less than `context` tokens do not count. Raises EvalError when none is left.
    """
    able = [variant for variant in variants if variant.summary.context_length >= context]
    if not able:
        longest = max(variant.summary.context_length for variant in variants)
        raise EvalError(
            f"{variants[0].name}: made for {longest} tokens of context, {context} were asked for",
            hint=f"give --context {longest} or less",
        )
    extra = {**ALLOWANCE, **(allowance or {})}
    measured = all(variant.kl for variant in able)
    options = [
        Option(
            variant=variant,
            cache=cache,
            needed=memory(variant.folder, context, cache),
            loss=loss_of(variant.kl, cache, extra) if measured else None,
        )
        for variant in able
        for cache in caches
    ]
    fitting = sorted((option for option in options if option.needed <= budget), key=rank)
    others = sorted((option for option in options if option.needed > budget), key=lambda option: option.needed)
    nearest = min(options, key=lambda option: (option.needed, rank(option)))
    best = fitting[0] if fitting else None
    return Choice(
        best=best,
        longest=longest_context(best or nearest, budget, memory),
        nearest=nearest,
        options=(*fitting, *others),
        measure="kl" if measured else "bits",
        why=why,
        budget=budget,
        context=context,
    )


def loss_of(kl: Mapping[str, float], cache: str, allowance: Mapping[str, float]) -> float:
    """KL of a variant with `cache`: as measured, else from its least lossy measurement and what the types differ by."""
    if cache in kl:
        return kl[cache]
    base = max(kl, key=_cache_order)
    return kl[base] + max(0.0, _extra(cache, allowance) - _extra(base, allowance))


def rank(option: Option) -> tuple[object, ...]:
    """Less is better. See the top of this file."""
    tie = (tuple(-order for order in _cache_order(option.cache)), option.needed, option.variant.name)
    if option.loss is not None:
        return (option.loss, *tie)
    bits = option.variant.summary.bits_per_weight
    return (tier(bits, option.cache), -bits, *tie)


def tier(bits: float, cache: str) -> int:
    """Which trade between weights and cache comes first; 0 is the best. Bits are rounded: 3.96 is a 4-bit variant."""
    whole = round(bits, 1)
    weights = 0 if whole >= 4 else 1 if whole >= 3 else 2
    held = cache_bits(cache)
    keys = 0 if held >= 8 else 1 if held >= 6 else 2
    return ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2)).index((weights, keys))


def longest_context(option: Option, budget: int, memory: Memory) -> int:
    """Tokens of context that fit `budget` with this option: whole cache pages, up to the model's own; 0: not one."""
    limit = option.variant.summary.context_length
    pages = range(1, -(-limit // PAGE_SIZE) + 1)
    fitting = bisect_right(
        pages, budget, key=lambda n: memory(option.variant.folder, min(limit, n * PAGE_SIZE), option.cache)
    )
    return min(limit, fitting * PAGE_SIZE)


def _cache_order(cache: str) -> tuple[int, bool]:
    """More is better: bits, and at 16 of them the ones of fp16 over those of bf16."""
    return cache_bits(cache), not cache.startswith("b")


def _extra(cache: str, allowance: Mapping[str, float]) -> float:
    """What `cache` adds; a type in between that nobody measured counts as the next smaller one."""
    if cache in allowance:
        return allowance[cache]
    bits = cache_bits(cache)
    if bits >= 16:
        return 0.0
    smaller = [value for name, value in allowance.items() if cache_bits(name) <= bits]
    return min(smaller) if smaller else math.inf


def _measured_allowance(
    found: Sequence[tuple[Path, "ModelSummary"]], sets: Sequence[SavedSet]
) -> Iterable[tuple[str, float]]:
    """Per cache type the largest KL that any variant of this model had against itself."""
    worst: dict[str, float] = {}
    for one in sets:
        for folder, summary in found:
            for cache, kl in one.of(folder, summary.file_bytes).items():
                worst[cache] = max(kl, worst.get(cache, 0.0))
    return worst.items()
