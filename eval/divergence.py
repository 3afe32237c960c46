"""How far a model's next-token distributions are from those of its source, and when that means nothing.

KL(reference || model) per token, in nats (Kullback and Leibler 1951): 0 for equal distributions, and what the model
loses per token when the reference is the truth. The noise floor is the same measure between the source in float32 and
the source itself in bf16, the precision it is commonly run in: smaller differences are no matter of the weights.
"""

import argparse
import math
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from exl_runtime.console.progress import Progress
from exl_runtime.errors import EvalError, StorageError

from .protocol import Window

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime

    from .reference import Reference

RESOLUTION = 1e-6  # nats: what the storage of the reference can add to a mean, see `logprobs.py`
TOP = 5
FLOOR = "bf16"  # activations, keys and values of the source for the noise floor
_NEAREST = 16  # positions below it are one bucket; each bucket after it is twice as wide
Advance = Callable[[int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Of KL(reference || model) over scored tokens, in nats: mean, median, p90, p99 (percentiles), max.

    stderr       standard error of the mean, from how much windows differ, as in `Perplexity`; NaN for one window
    top1         share of tokens where the reference's most likely token is the model's most likely one too
    top5         share of tokens where the reference's most likely token is among the model's five most likely
    by_position  (from, to, mean KL): of tokens with so many tokens before them in their window, both ends included
    nll_p, nll_q mean negative log-likelihood of the text's tokens by the reference and by the model, nats
    stderr_q     standard error of nll_q, as `Perplexity.stderr`
    seconds      of the model, without the reference          partial    the user ended it before the last window
    """

    tokens: int
    windows: int
    mean: float
    stderr: float
    median: float
    p90: float
    p99: float
    max: float
    top1: float
    top5: float
    by_position: tuple[tuple[int, int, float], ...]
    nll_p: float
    nll_q: float
    stderr_q: float = math.nan
    seconds: float
    partial: bool

    @property
    def perplexity_p(self) -> float:
        """Of the reference."""
        return _exp(self.nll_p)

    @property
    def perplexity_q(self) -> float:
        """Of the model."""
        return _exp(self.nll_q)

    def facts(self) -> dict[str, object]:
        """For JSON; None stands for NaN."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return {**plain, "by_position": [list(bucket) for bucket in self.by_position]}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Divergence":
        """The inverse of `facts`. Raises ValueError for anything else."""
        try:
            values = {field.name: facts[field.name] for field in fields(cls)}
            buckets = tuple((int(start), int(end), float(mean)) for start, end, mean in values.pop("by_position"))
            whole = {name: int(values.pop(name)) for name in ("tokens", "windows")}
            partial = bool(values.pop("partial"))
            reals = {name: math.nan if value is None else float(value) for name, value in values.items()}
        except (KeyError, TypeError) as err:
            raise ValueError(f"no divergence: {err}") from err
        return cls(**whole, **reals, by_position=buckets, partial=partial)


def measure(
    reference: "Reference",
    runtime: "Runtime",
    windows: Iterable[Window],
    advance: Advance = lambda n, note: None,
) -> Divergence:
    """Compare `runtime` with `reference` on the windows that it was opened for, or on the first ones of them.

    advance(1, note)   is called after each window; the note holds the mean so far
    Memory: the reference's rows of one window (2 bytes per token and vocabulary entry), and 8 bytes per token of the
    text, for exact percentiles. After Ctrl-C (KeyboardInterrupt) what there is by then is returned as partial; before
    the first window is done it passes through. Raises EvalError: NaN logits, another vocabulary, no window; and as
    `scoring.score`, `Reference.rows`.
    """
    tally = _Tally()
    partial = False
    try:
        for index, window in enumerate(windows):
            _compare(reference, runtime, index, window, tally)
            advance(1, f"KL {tally.mean:.5f}")
    except KeyboardInterrupt:
        if not tally.sums:
            raise
        partial = True
    if not tally.sums:
        raise EvalError("no window to score", hint="give a text with more tokens")
    return tally.result(partial)


def noise_floor(
    reference: "Reference", args: argparse.Namespace, windows: Iterable[Window], progress: Progress
) -> Divergence:
    """The source in bf16 (activations, keys, values) against itself in float32, on the windows of `reference`.

    Kept beside the reference, so that it is computed once; a partial one (see `measure`) is not kept.
    args   the options of `opening.add_loading`. Raises as `measure` and `opening.open_model`.
    """
    from .opening import open_model

    name = f"floor-{FLOOR}"
    try:
        if (facts := reference.recall(name)) is not None:
            return Divergence.from_facts(facts)
    except (StorageError, ValueError):
        progress.warn(f"the noise floor kept beside {reference.path} is damaged; it is computed anew")
    with (
        open_model(
            reference.folder, args, progress, context=max(2, reference.longest), cache=FLOOR, dtype=FLOOR
        ) as runtime,
        progress.stage("noise floor", total=reference.windows, unit="windows") as steps,
    ):
        found = measure(reference, runtime, windows, steps.advance)
    if not found.partial:
        try:
            reference.remember(name, found.facts())
        except StorageError as err:
            progress.warn(f"the noise floor is not kept: {err.problem}")
    return found


def times_floor(found: Divergence, floor: Divergence) -> float:
    """Mean divergence in noise floors; a floor below what storage can tell counts as that."""
    return found.mean / max(floor.mean, RESOLUTION)


def verdict(found: Divergence, floor: Divergence) -> str:
    """One line: what the mean is worth beside the noise floor. Within it: not above it by two standard errors."""
    level = max(floor.mean, RESOLUTION)
    errors = [error for error in (found.stderr, floor.stderr) if math.isfinite(error)]
    known = f"mean KL {found.mean:.6f}; the source itself in {FLOOR}: {floor.mean:.6f}"
    if found.mean <= level + 2 * math.hypot(*errors):
        return f"within the noise floor: no difference that means anything ({known})"
    return f"{times_floor(found, floor):.1f} times the noise floor ({known})"


def _compare(reference: "Reference", runtime: "Runtime", index: int, window: Window, tally: "_Tally") -> None:
    """One window into `tally`, or nothing of it."""
    import numpy as np
    import torch
    from torch import Tensor

    from . import logprobs as codec
    from .scoring import score

    rows = reference.rows(index, window)
    targets = torch.tensor(window.ids[window.first :])
    count = len(targets)
    kl, lost, better = np.empty(count), np.empty(count), np.empty(count, dtype=np.int64)
    best = torch.from_numpy(rows.top).long()

    def visit(positions: slice, logprobs: Tensor) -> None:
        if logprobs.shape[1] != rows.codes.shape[1]:
            raise EvalError(
                f"{runtime.info.name} has {logprobs.shape[1]} logits per token, the reference {reference.name} has "
                f"{rows.codes.shape[1]}",
                hint="the reference must be the model that this one was made from",
            )
        kl[positions] = codec.divergence(rows.codes[positions], logprobs)
        lost[positions] = codec.nll(logprobs, targets[positions])
        # How many tokens the model prefers to the reference's favourite; ties are agreement.
        favourite = logprobs.gather(1, best[positions, None])
        better[positions] = (logprobs > favourite).sum(dim=1).numpy()

    started = time.perf_counter()
    score(runtime, window, visit)
    tally.seconds += time.perf_counter() - started
    tally.add(kl, rows.nll, lost, better, window.first)


class _Tally:
    """Sums over tokens, and what percentiles and the standard error need: one number per token, two per window."""

    def __init__(self) -> None:
        self.values = array("d")
        self.sums = array("d")
        self.losses = array("d")
        self.counts = array("q")
        self.seconds = 0.0
        self._lost = [0.0, 0.0]
        self._agreed = [0, 0]
        self._buckets: dict[int, list[float]] = {}  # first position -> sum, tokens, last position seen

    @property
    def mean(self) -> float:
        """So far."""
        return math.fsum(self.sums) / len(self.values)

    def add(self, kl: Any, nll_p: Any, nll_q: Any, better: Any, first: int) -> None:
        """One window: float64 (n,), float64 (n,), float64 (n,), int64 (n,); first: position of the first token."""
        self.values.frombytes(kl.tobytes())
        for i, lost in enumerate((nll_p, nll_q)):
            self._lost[i] += float(lost.sum())
        for i, rank in enumerate((1, TOP)):
            self._agreed[i] += int((better < rank).sum())
        at, end = first, first + len(kl)
        while at < end:
            start = 0 if at < _NEAREST else 1 << (at.bit_length() - 1)
            stop = min(end, max(_NEAREST, 2 * start))
            bucket = self._buckets.setdefault(start, [0.0, 0, at, at])
            bucket[0] += float(kl[at - first : stop - first].sum())
            bucket[1] += stop - at
            bucket[2], bucket[3] = min(bucket[2], at), max(bucket[3], stop - 1)
            at = stop
        self.counts.append(len(kl))
        self.losses.append(float(nll_q.sum()))
        self.sums.append(float(kl.sum()))  # last: a window counts when all of it is in

    def result(self, partial: bool) -> Divergence:
        """Of at least one window."""
        import numpy as np

        values = np.frombuffer(self.values)
        n = len(values)
        median, p90, p99 = (float(x) for x in np.quantile(values, (0.5, 0.9, 0.99)))
        return Divergence(
            tokens=n,
            windows=len(self.sums),
            mean=self.mean,
            stderr=self._stderr(self.sums),
            median=median,
            p90=p90,
            p99=p99,
            max=float(values.max()),
            top1=self._agreed[0] / n,
            top5=self._agreed[1] / n,
            by_position=tuple(
                (int(low), int(high), total / count) for _, (total, count, low, high) in sorted(self._buckets.items())
            ),
            nll_p=self._lost[0] / n,
            nll_q=self._lost[1] / n,
            stderr_q=self._stderr(self.losses),
            seconds=self.seconds,
            partial=partial,
        )

    def _stderr(self, sums_of_windows: "array[float]") -> float:
        """A window is one draw, as its tokens depend on each other (Cochran, Sampling Techniques, section 6.3)."""
        import numpy as np

        windows = len(self.sums)  # Ctrl-C may have left a window half-added: its last entries do not count
        sums = np.frombuffer(sums_of_windows)[:windows]
        counts = np.frombuffer(self.counts, dtype=np.int64)[:windows]
        if windows < 2:
            return math.nan
        residuals = sums - sums.sum() / counts.sum() * counts
        return float(np.sqrt((residuals**2).sum() * windows / (windows - 1)) / counts.sum())


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
