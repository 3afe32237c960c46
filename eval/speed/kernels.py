"""Times of single operations with cold caches, against torch and against what memory allows."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from exl_runtime.cache.types import CacheType, cache_type
from exl_runtime.model.placement import resolve_cache

from ..made.shape import Shape
from ..tables import Table, left, right
from .cases import Case, Stored, Where, attention_case, linear_cases, matrices, small_cases
from .spread import Spread, ratios, short, spread
from .timers import Timer

KINDS = ("linear", "attention", "small")
CONTEXTS = (512, 2048, 8192)
LEAST_SECONDS = 0.01  # of one sample, if there are enough copies to fill it
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One case: seconds of one call, a value per sample; others: of torch, by name; bandwidth: bytes per second."""

    case: Case
    threads: int | None
    seconds: tuple[float, ...]
    others: dict[str, tuple[float, ...]]
    bandwidth: float

    @property
    def floor(self) -> float:
        """Seconds that moving the bytes alone would take."""
        return self.case.nbytes / self.bandwidth


@dataclass(slots=True)
class Bench:
    """partial: the user ended it early."""

    rows: list[Measured] = field(default_factory=list)
    partial: bool = False


def count_cases(
    shape: Shape,
    stored: Sequence[Stored],
    rows: Sequence[int],
    contexts: Sequence[int],
    kinds: Sequence[str],
    caches: Sequence[CacheType],
) -> int:
    """How many cases `all_cases` gives."""
    linear = len(stored_matrices(shape, stored)) * len(rows) if "linear" in kinds else 0
    attention = len(contexts) * len(caches) if "attention" in kinds else 0
    return linear + attention + (4 * len(rows) if "small" in kinds else 0)


def stored_matrices(shape: Shape, stored: Sequence[Stored]) -> list[tuple[str, int, int, Stored]]:
    """Every matrix in every way it is stored; the head once for EXL2, and not in GPTQ, which leaves it dense."""
    found, head_done = [], set()
    for how in stored:
        for name, inputs, outputs in matrices(shape):
            if name == "head" and (how.format == "gptq" or how.format in head_done):
                continue
            if name == "head":
                head_done.add(how.format)
            found.append((name, inputs, outputs, how))
    return found


def usual_caches(device: torch.device) -> tuple[CacheType, ...]:
    """The default type of keys and values, fp16, and on a GPU those of 8 and 4 bits."""
    names = ("fp16", "q8", "q4") if device.type == "cuda" else ("fp16",)
    return tuple(dict.fromkeys((resolve_cache("auto", device), *map(cache_type, names))))


def usual_contexts(device: torch.device) -> tuple[int, ...]:
    """Keys that attention is timed over."""
    return (2048, 32768) if device.type == "cuda" else CONTEXTS


def all_cases(
    shape: Shape,
    stored: Sequence[Stored],
    rows: Sequence[int],
    contexts: Sequence[int],
    kinds: Sequence[str],
    caches: Sequence[CacheType],
    where: Where,
) -> Iterator[Case]:
    """Made one after another: what a matrix needs is dropped before the next one is made."""
    if "linear" in kinds:
        for name, inputs, outputs, how in stored_matrices(shape, stored):
            yield from linear_cases(name, inputs, outputs, how, rows, where)
    if "attention" in kinds:
        for cache in caches:
            for context in contexts:
                yield attention_case(shape, context, cache, where)
    if "small" in kinds:
        yield from small_cases(shape, rows, where)


def bench(
    cases: Callable[[], Iterable[Case]],
    threads: Sequence[int | None],
    *,
    set_threads: Callable[[int], None],
    timer: Timer,
    bandwidth: Callable[[], float],
    runs: int,
    advance: Callable[[str], None] = lambda note: None,
) -> Bench:
    """Measure every case with every number of threads, `runs` samples each. Ctrl-C leaves what was done."""
    result = Bench()
    try:
        for count in threads:
            if count is not None:
                set_threads(count)
            with torch.inference_mode():
                for case in cases():
                    speed = bandwidth()
                    turns = [_Turns(case.call, case.copies, timer)]
                    turns += [_Turns(call, copies, timer) for call, copies in case.others.values()]
                    # One sample of each in turn: what drifts hits all of them.
                    samples = [[turn.sample() for turn in turns] for _ in range(runs)]
                    ours, *others = zip(*samples, strict=True)
                    named = dict(zip(case.others, others, strict=True))
                    result.rows.append(Measured(case=case, threads=count, seconds=ours, others=named, bandwidth=speed))
                    advance(f"{case.name}, {case.stored}, m {case.m}")
    except KeyboardInterrupt:
        result.partial = True
    return result


class _Turns:
    """Calls that go round the copies; a sample goes on where the last one stopped."""

    def __init__(self, call: Callable[[int], object], copies: int, timer: Timer) -> None:
        self._call, self._copies, self._timer = call, copies, timer
        self._next = 0
        self._run(1)  # builds and allocates
        once = timer(lambda: self._run(1))
        self._calls = max(1, min(copies, math.ceil(LEAST_SECONDS / max(once, 1e-9))))

    def sample(self) -> float:
        """Seconds of one call, the mean over a sample."""
        return self._timer(lambda: self._run(self._calls)) / self._calls

    def _run(self, calls: int) -> None:
        for _ in range(calls):
            self._call(self._next)
            self._next = (self._next + 1) % self._copies


def text_of(result: Bench, heading: Sequence[str]) -> str:
    """Tables, and a last line of JSON."""
    lines = [
        *heading,
        "medians over samples, least to greatest in brackets; floor: bytes at the bandwidth of the moment",
    ]
    for threads in dict.fromkeys(row.threads for row in result.rows):
        for kind in KINDS:
            rows = [row for row in result.rows if row.case.kind == kind and row.threads == threads]
            if rows:
                caption = kind if threads is None else f"{kind}, {threads} thread{'s' if threads > 1 else ''}"
                lines += ["", _table(rows, caption).text()]
    if result.partial:
        lines += ["", "PARTIAL: interrupted; these are the operations that were done by then"]
    return "\n".join([*lines, "", json.dumps(facts_of(result), allow_nan=False)])


def facts_of(result: Bench) -> dict[str, object]:
    """Everything, as one JSON object; times in seconds."""
    return {"partial": result.partial, "operations": [_facts(row) for row in result.rows]}


def _facts(row: Measured) -> dict[str, object]:
    case, taken = row.case, spread(row.seconds)
    return {
        "kind": case.kind,
        "name": case.name,
        "stored": case.stored,
        "m": case.m,
        "threads": row.threads,
        "seconds": taken.facts(),
        "bytes": case.nbytes,
        "floor_seconds": row.floor,
        "share_of_floor": row.floor / taken.median,
        "bandwidth_bytes_per_second": row.bandwidth,
        "flop_per_second": case.flop / taken.median,
        "torch_seconds": {name: spread(values).facts() for name, values in row.others.items()},
        "times_as_fast_as_torch": {
            name: found.facts() for name, values in row.others.items() if (found := ratios(values, row.seconds))
        },
    }


def _table(rows: Sequence[Measured], caption: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.others))
    table = Table(
        [
            left("operation"),
            left("stored"),
            right("m"),
            right("time, us"),
            right("GB/s"),
            right("% of floor"),
            right("GFLOP/s"),
            *(right(f"x torch {name}") for name in names),
        ],
        caption=caption,
    )
    for row in rows:
        case, taken = row.case, spread(row.seconds)
        micro = Spread(taken.median * 1e6, taken.low * 1e6, taken.high * 1e6, taken.count)
        times = {name: ratios(values, row.seconds) for name, values in row.others.items()}
        table.add(
            case.name,
            case.stored,
            str(case.m),
            micro.text(),
            short(case.nbytes / taken.median / GIGA),
            short(100 * row.floor / taken.median),
            short(case.flop / taken.median / GIGA) if case.flop else "-",
            *(short(found.median) if (found := times.get(name)) else "-" for name in names),
        )
    return table
