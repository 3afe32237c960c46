"""The result of comparing models or cache types: as a table, as lines for people, as values for programs.

Knows no models: what is here was measured elsewhere (`compare.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exl_runtime.console.sizes import size_text

from .saved import FORMAT, VERSION
from .tables import NONE, Table, left, number, right

if TYPE_CHECKING:
    from .divergence import Divergence
    from .layers import MatrixError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model with one cache type. Sizes in bytes, contexts in tokens.

    bits_per_weight  of the layers, overhead included      head_bits   of the output head
    file_bytes       of all tensors on disk                 memory_bytes  as `exl info` plans, with `context` tokens
    bytes_per_token  of keys and values
    nll, nll_stderr  mean negative log-likelihood in nats and its standard error over windows; NaN: not measured
    divergence       from the reference; None: there is none, or it was not measured
    conditions       how the model ran                      partial     ended by the user before the last window
    problem          why there are no figures; "" when there are. What could be read from headers is filled in anyway
    """

    name: str
    path: str
    cache: str
    format: str = ""
    bits_per_weight: float = math.nan
    head_bits: float = math.nan
    file_bytes: int | None = None
    memory_bytes: int | None = None
    bytes_per_token: float = math.nan
    context: int = 0
    nll: float = math.nan
    nll_stderr: float = math.nan
    tokens: int = 0
    windows: int = 0
    seconds: float = math.nan
    divergence: "Divergence | None" = None
    conditions: str = ""
    partial: bool = False
    problem: str = ""

    @property
    def label(self) -> str:
        """Of one row among others."""
        return f"{self.name}, {self.cache}"

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return _exp(self.nll)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows in the order they were asked for.

    command    "compare" | "cache"
    protocol   one line, see `Protocol.describe`
    reference  folder of the source; "" without one; of a `cache` run without one, the model itself stands in (`own`)
    source     where the figures of the reference come from, one line
    floor      the noise floor; None: not measured
    layers     path of a variant -> errors of its matrices            flaws   path -> why there are none
    interrupted   the user ended the work; rows may be missing
    """

    command: str
    protocol: str
    rows: tuple[Row, ...]
    windows: int
    reference: str = ""
    own: bool = False
    source: str = ""
    floor: "Divergence | None" = None
    layers: "Mapping[str, tuple[MatrixError, ...]]" = field(default_factory=dict)
    flaws: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def source_nll(self) -> float:
        """Of the reference on the same tokens; NaN where it is not known."""
        whole = (row.divergence for row in self.rows if row.divergence is not None and not row.partial)
        return next((found.nll_p for found in whole), math.nan)

    @property
    def caches(self) -> int:
        """How many types of cache were measured."""
        return len({row.cache for row in self.rows if not row.problem})

    @property
    def failed(self) -> tuple[Row, ...]:
        """Rows without figures because something is wrong with the model."""
        return tuple(row for row in self.rows if row.problem)

    @property
    def code(self) -> int:
        """Of the program: 130 after Ctrl-C, 2 when a model could not be measured, else 0."""
        return 130 if self.interrupted else 2 if self.failed else 0


def table(comparison: Comparison) -> Table:
    """What can be compared, a row per model and cache type."""
    if comparison.command == "cache":
        return _cache_table(comparison)
    several = comparison.caches > 1
    judged = bool(comparison.reference)
    columns = [left("model"), *([left("cache")] if several else []), left("format"), right("bits"), right("head")]
    columns += [right("files"), right("memory"), right("perplexity")]
    columns += [right(title) for title in _KL] if judged else []
    found = Table(columns)
    for row in comparison.rows:
        cells = [
            f"{row.name} (partial)" if row.partial else row.name,
            *([row.cache] if several else []),
            row.format or NONE,
        ]
        cells += [number(row.bits_per_weight, ".2f"), number(row.head_bits, ".2f")]
        cells += [_size(row.file_bytes), _size(row.memory_bytes), _perplexity(row)]
        found.add(*cells, *(_kl(row.divergence, comparison.floor) if judged else ()))
    spare = [NONE] * (len(columns) - 2 - len(_KL))
    if math.isfinite(comparison.source_nll):
        found.add("(source in fp32)", *spare, f"{_exp(comparison.source_nll):.4f}", *_kl(None, None))
    if comparison.floor is not None:
        found.add("(source in bf16)", *spare, _perplexity_of(comparison.floor), *_kl(comparison.floor, None))
    return found


def _cache_table(comparison: Comparison) -> Table:
    found = Table(
        [left("cache"), right("bytes per token"), right("perplexity"), *(right(title) for title in _KL), left("")]
    )
    for row in comparison.rows:
        kl = _kl(row.divergence, comparison.floor, ".6f")
        found.add(
            row.cache, number(row.bytes_per_token, ".0f"), _perplexity(row), *kl, "partial" if row.partial else ""
        )
    if comparison.floor is not None:
        floor = comparison.floor
        found.add("(all in bf16)", NONE, _perplexity_of(floor), *_kl(floor, None, ".6f"), "")
    return found


def lines(comparison: Comparison) -> str:
    """The table and all that belongs to it, for a terminal or a log."""
    parts = [table(comparison).text(), "", f"protocol: {comparison.protocol}"]
    parts += [f"conditions: {text}" for text in conditions(comparison)]
    if comparison.source:
        parts.append(f"reference: {comparison.source}")
    parts += legend(comparison)
    parts += [f"not measured: {row.label}: {row.problem}" for row in comparison.failed]
    parts += [f"no errors of matrices: {path}: {why}" for path, why in comparison.flaws.items()]
    if comparison.interrupted:
        parts += partial_lines(comparison)
    return "\n".join(parts)


def conditions(comparison: Comparison) -> list[str]:
    """How the models ran, each way once."""
    return list(dict.fromkeys(row.conditions for row in comparison.rows if row.conditions))


def partial_lines(comparison: Comparison) -> list[str]:
    """What an interrupted comparison lacks."""
    cut = [row for row in comparison.rows if row.partial]
    found = [f"PARTIAL: {row.label}: {row.windows} of {comparison.windows} windows" for row in cut]
    return [*found, "PARTIAL: the work was interrupted; models after this point were not looked at"]


def legend(comparison: Comparison) -> list[str]:
    """What the columns mean."""
    found = []
    if comparison.command == "compare":
        contexts = sorted({row.context for row in comparison.rows if row.memory_bytes})
        found.append(
            f"bits: per weight in the layers; memory: weights, cache of {_or(contexts)} tokens and working memory, as "
            "`exl info` counts"
        )
    found.append("perplexity: ± standard error over windows")
    if comparison.reference or comparison.own:
        against = "the same model with the fp32 cache" if comparison.own else comparison.reference
        floors = "; x floor: mean KL in noise floors" if comparison.floor is not None else ""
        found.append(f"KL: of the next token, in nats, from {against}; top-1: tokens with the same favourite{floors}")
    if comparison.floor is not None:
        found.append("noise floor: the source in bf16 against itself in fp32; differences of that size mean nothing")
    return found


def facts(comparison: Comparison) -> dict[str, object]:
    """For programs, and for `recommend`; see `saved.py`. NaN is None."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "command": comparison.command,
        "protocol": comparison.protocol,
        "reference": comparison.reference or None,
        "source": comparison.source or None,
        "windows": comparison.windows,
        "noise_floor": None if comparison.floor is None else comparison.floor.facts(),
        "rows": [_row_facts(row, comparison.floor) for row in comparison.rows],
        "layers": {
            path: [
                {"layer": entry.layer, "kind": entry.kind, "bits": _plain(entry.bits), "error": _plain(entry.error)}
                for entry in errors
            ]
            for path, errors in comparison.layers.items()
        },
        "partial": comparison.interrupted,
    }


def _row_facts(row: Row, floor: "Divergence | None") -> dict[str, object]:
    known = {
        "name": row.name,
        "path": row.path,
        "cache": row.cache,
        "model_format": row.format or None,
        "bits_per_weight": _plain(row.bits_per_weight),
        "head_bits": _plain(row.head_bits),
        "file_bytes": row.file_bytes,
        "memory_bytes": row.memory_bytes,
        "cache_bytes_per_token": _plain(row.bytes_per_token),
        "context": row.context,
        "perplexity": _plain(row.perplexity),
        "perplexity_stderr": _plain(row.perplexity * row.nll_stderr),
        "nll": _plain(row.nll),
        "nll_stderr": _plain(row.nll_stderr),
        "tokens": row.tokens,
        "windows": row.windows,
        "seconds": _plain(row.seconds),
        "conditions": row.conditions,
        "partial": row.partial,
        "problem": row.problem or None,
    }
    if row.divergence is not None:
        kl = row.divergence.facts()
        known["kl_mean"] = kl["mean"]
        known["times_noise_floor"] = None if floor is None else _plain(_times(row.divergence, floor))
        known["divergence"] = kl
    return known


_KL = ("KL mean", "±", "KL median", "KL 99 %", "top-1 %", "x floor")


def _kl(found: "Divergence | None", floor: "Divergence | None", spec: str = ".5f") -> tuple[str, ...]:
    """Cells under `_KL`; spec: of the divergences."""
    if found is None:
        return (NONE,) * len(_KL)
    times = NONE if floor is None else number(_times(found, floor), ".1f")
    values = (found.mean, found.stderr, found.median, found.p99)
    return (*(number(value, spec) for value in values), number(100 * found.top1, ".2f"), times)


def _times(found: "Divergence", floor: "Divergence") -> float:
    from .divergence import times_floor

    return times_floor(found, floor)


def _perplexity(row: Row) -> str:
    if not math.isfinite(row.perplexity):
        return NONE
    spread = f" ± {row.perplexity * row.nll_stderr:.4f}" if math.isfinite(row.nll_stderr) else ""
    return f"{row.perplexity:.4f}{spread}"


def _perplexity_of(found: "Divergence") -> str:
    spread = f" ± {found.perplexity_q * found.stderr_q:.4f}" if math.isfinite(found.stderr_q) else ""
    return f"{found.perplexity_q:.4f}{spread}"


def _size(nbytes: int | None) -> str:
    return NONE if nbytes is None else size_text(nbytes, like=1)


def _or(contexts: list[int]) -> str:
    return " or ".join(map(str, contexts)) if contexts else "no"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _exp(nll: float) -> float:
    return math.inf if nll > 700 else math.exp(nll)
