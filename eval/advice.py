"""A recommendation in words, and as values for programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from exl_runtime.console.sizes import size_text

from .recommend import RULES, Choice, Option, rank
from .tables import Table, left, number, right

MOST = 8  # options shown of those that fit, and of those that do not


def advice_text(choices: Sequence[Choice], skipped: Sequence[tuple[Path, str]]) -> str:
    """Everything a person needs to act on it: the choice and its reasons, the other options, the rules."""
    parts = [_choice_text(choice) for choice in choices]
    if skipped:
        parts.append("\n".join(["not considered:", *(f"  {folder.name}: {why}" for folder, why in skipped)]))
    parts.append("\n".join(["rules:", *(f"  {index}. {rule}" for index, rule in enumerate(RULES, 1))]))
    return "\n\n".join(parts)


def advice_facts(choices: Sequence[Choice], skipped: Sequence[tuple[Path, str]]) -> dict[str, object]:
    """The same for programs. Sizes in bytes, contexts in tokens, losses in nats."""
    return {
        "choices": [
            {
                "architecture": choice.nearest.variant.summary.architecture,
                "parameters": choice.nearest.variant.summary.parameters,
                "budget_bytes": choice.budget,
                "context": choice.context,
                "measure": choice.measure,
                "why": choice.why,
                "best": None if choice.best is None else _facts(choice.best, choice),
                "longest_context": choice.longest,
                "nearest": _facts(choice.nearest, choice),
                "options": [_facts(option, choice) for option in choice.options],
            }
            for choice in choices
        ],
        "skipped": [{"path": str(folder), "problem": why} for folder, why in skipped],
        "rules": list(RULES),
    }


def _facts(option: Option, choice: Choice) -> Mapping[str, object]:
    summary = option.variant.summary
    return {
        "name": summary.name,
        "path": str(option.variant.folder.resolve()),
        "format": summary.format,
        "bits_per_weight": summary.bits_per_weight,
        "cache": option.cache,
        "needed_bytes": option.needed,
        "spare_bytes": choice.budget - option.needed,
        "loss": option.loss,
    }


def _choice_text(choice: Choice) -> str:
    summary = choice.nearest.variant.summary
    count = summary.parameters
    weights = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
    lines = [f"{summary.architecture}, {weights} weights", ""]
    lines += _found(choice, choice.best) if choice.best is not None else _not_found(choice)
    shown = (*choice.fitting[:MOST], *choice.options[len(choice.fitting) :][:MOST])
    lines += ["", _options(choice, shown).text()]
    if len(shown) < len(choice.options):
        lines.append(f"and {len(choice.options) - len(shown)} more; --json lists all")
    return "\n".join(lines)


def _found(choice: Choice, best: Option) -> list[str]:
    size = _sizes(choice)
    lines = [
        f"take {best.variant.name}: {_what(best)}, {best.cache} cache, {choice.context} tokens of context",
        f"  needs {size(best.needed)} of {size(choice.budget)}, {size(choice.budget - best.needed)} are spare",
    ]
    if choice.longest > choice.context:
        whole = " (all it was made for)" if choice.longest == best.variant.summary.context_length else ""
        lines.append(f"  up to {choice.longest} tokens of context{whole} fit beside it: --context {choice.longest}")
    lines.append(f"  why: {_why(choice, best)}")
    lines.append(f"  measure: {_measure(choice)}")
    return lines


def _not_found(choice: Choice) -> list[str]:
    size = _sizes(choice)
    nearest = choice.nearest
    lines = [
        f"nothing fits {size(choice.budget)} with {choice.context} tokens of context",
        f"  nearest: {nearest.variant.name}, {_what(nearest)}, {nearest.cache} cache needs {size(nearest.needed)}, "
        f"{size(nearest.needed - choice.budget)} more",
    ]
    if choice.longest:
        lines.append(f"  it would fit with {choice.longest} tokens of context: --context {choice.longest}")
    else:
        lines.append("  it does not fit with any context: a variant with fewer bits, or a smaller model, is needed")
    lines.append(f"  measure: {_measure(choice)}")
    return lines


def _what(option: Option) -> str:
    text = f"{option.variant.summary.format}, {option.variant.summary.bits_per_weight:.2f} bits per weight"
    return text if option.loss is None else f"{text}, KL {option.loss:.5f}"


def _measure(choice: Choice) -> str:
    if choice.measure == "kl":
        return f"KL divergence: {choice.why}"
    return f"bits per weight of the layers: {choice.why or 'nothing was measured'}"


def _why(choice: Choice, best: Option) -> str:
    """The first reason against what would have been better had it fitted."""
    better = [option for option in choice.options if option.needed > choice.budget and rank(option) < rank(best)]
    if not better:
        return "the best there is by this measure"
    nearest = min(better, key=lambda option: option.needed)
    size = _sizes(choice)
    return (
        f"the best that fits; the next better, {nearest.variant.name} with a {nearest.cache} cache, "
        f"needs {size(nearest.needed)}"
    )


def _options(choice: Choice, shown: Sequence[Option]) -> Table:
    """One row per option, the chosen one marked."""
    size = _sizes(choice)
    table = Table(
        [
            left(""),
            left("variant"),
            left("format"),
            right("bits"),
            left("cache"),
            right("loss (KL)"),
            right("needs"),
            right("spare"),
        ]
    )
    for option in shown:
        spare = choice.budget - option.needed
        table.add(
            "*" if option is choice.best else "",
            option.variant.name,
            option.variant.summary.format,
            f"{option.variant.summary.bits_per_weight:.2f}",
            option.cache,
            number(option.loss, ".5f"),
            size(option.needed),
            size(spare) if spare >= 0 else f"{size(-spare)} too much",
        )
    return table


def _sizes(choice: Choice):
    """Sizes in the unit that the budget is in."""
    return lambda nbytes: size_text(nbytes, like=choice.budget)
