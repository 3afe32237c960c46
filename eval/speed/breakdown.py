"""Where one decode step spends its time: the native pass by phase, everything around it by who does it.

Functions of this package's own runtime are wrapped while it is measured; a wrapped one counts what it spends itself,
not what the wrapped ones inside it spend. A step lasts from the end of the one before to its own end, by the clock:
what runs beside a pass that was begun ahead (`ops.step.Onward`) makes it no longer.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from exl_runtime.generation.engine import Engine
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.runner import Runner
from exl_runtime.generation.scheduler import Scheduler
from exl_runtime.model.batch import Plan
from exl_runtime.model.step import NativeStep
from exl_runtime.model.transformer import Transformer
from exl_runtime.ops import native
from exl_runtime.runtime import Runtime
from exl_runtime.sampling.params import SamplingParams
from exl_runtime.sampling.sampler import Sampler
from exl_runtime.tokenizer.detokenizer import Detokenizer

from ..tables import Table, left, right
from .spread import short
from .traffic import Traffic

GREEDY = SamplingParams(temperature=0.0)
ATTEMPTS = 8
PRODUCTS = ("project", "out", "mlp", "head")  # phases of the native pass that multiply
ATTENTION = "attend"  # the one that reads the cache
NATIVE = "native call"  # what of it is no phase: arguments and checks
WAITING = "waiting for the pass"  # in its place, where the pass was begun ahead
BETWEEN = "between two steps"  # who asked for the reply
PARTS: tuple[tuple[type, str, str], ...] = (
    (Generator, "step", "queue and delivery"),
    (Engine, "step", "engine"),
    (Scheduler, "schedule", "scheduler"),
    (Scheduler, "commit", "pages"),
    (Engine, "_advance", "stops and events"),
    (Runner, "run", "runner"),
    (Runner, "draw", "runner"),
    (Runner, "_plan_of", "describing the batch"),
    (Transformer, "forward_plan", "angles and checks"),
    (Transformer, "draw_plan", "angles and checks"),
    (NativeStep, "run", NATIVE),
    (NativeStep, "draw", NATIVE),
    (Engine, "_hows", "sampling"),
    (Sampler, "sample", "sampling"),
    (Detokenizer, "push", "detokenizing"),
)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Seconds of one step, medians over `steps`: `phases` of the native pass, `around` it; and bytes a step reads.

    rest   what a step takes by the clock on top of its products and its attention
    ahead  share of the steps whose pass was begun before they were: what is `around` ran beside it
    """

    threads: int
    steps: int
    whole: float
    phases: dict[str, float]
    around: dict[str, float]
    rest: float
    read: float
    bandwidth: float
    ahead: float = 0.0

    @property
    def products(self) -> float:
        """Seconds of all matrix products."""
        return _products(self.phases)

    @property
    def attention(self) -> float:
        """Seconds of reading the cache."""
        return self.phases.get(ATTENTION, 0.0)

    @property
    def python(self) -> float:
        """Seconds of everything around the pass, wherever it ran."""
        return sum(seconds for name, seconds in self.around.items() if name != WAITING)


class Watch:
    """Spends of named parts in the step under way, nested ones counted once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.spent: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []  # what each part spent
        self.phases: list[dict[str, float]] = []  # of the passes of these steps
        self.walls: list[float] = []  # seconds from the end of the step before to the end of each
        self.asides: list[float] = []  # of it, spent on asking for the phases
        self.decoding = False  # the step under way computed one token of every sequence
        self._clock = clock
        self._inside = [0.0]  # what wrapped functions spent inside the one under way
        self._ended = clock()
        self._aside = 0.0

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`function`, counted under `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self._clock() - started
                self.spent[name] = self.spent.get(name, 0.0) + spent - self._inside.pop()
                self._inside[-1] += spent

        return timed

    def run_of(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """NativeStep.run and .draw, with their phases beside them."""
        counted = self.wrap(run, NATIVE)

        def timed(step: NativeStep, plan: Plan, *rest: Any) -> Any:
            result = counted(step, plan, *rest)
            self.phases.append(self._uncounted(step))
            self.decoding = len(plan.tokens) == len(plan.rope_lengths)
            return result

        return timed

    def _uncounted(self, step: NativeStep) -> dict[str, float]:
        """The phases since the last call; asking for them is nobody's time."""
        started = self._clock()
        phases = step.program.times(True)
        spent = self._clock() - started
        self._inside[-1] += spent
        self._aside += spent
        return phases

    def step_of(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Generator.step: the end of one is the end of a step."""
        counted = self.wrap(step, PARTS[0][2])

        def timed(*args: Any) -> Any:
            self.spent, self.decoding, self._aside = {}, False, 0.0
            count = len(self.phases)
            result = counted(*args)
            before, self._ended = self._ended, self._clock()
            if self.decoding:
                self.steps.append(self.spent)
                self.walls.append(self._ended - before)
                self.asides.append(self._aside)
            else:
                del self.phases[count:]
            return result

        return timed


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Every part is counted inside."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in PARTS]
    for (owner, name, original), (_, _, label) in zip(before, PARTS, strict=True):
        special = {Generator: watch.step_of, NativeStep: watch.run_of}.get(owner)
        setattr(owner, name, watch.wrap(original, label) if special is None else special(original))
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def break_down(
    runtime: Runtime, prompt: list[int], tokens: int, *, traffic: Traffic, bandwidth: float, ahead: bool = True
) -> Breakdown:
    """Up to `tokens` steps behind `prompt`; `ahead`: passes are begun ahead where they can be. ValueError if the model
    has no native pass."""
    model = _model_of(runtime)
    step, before = model.step, model.runs_ahead
    if step is None:
        raise ValueError("no step ran in the native pass")
    watch, kept = Watch(), Kept()
    try:
        model.runs_ahead = ahead
        runtime.generate(prompt, max_tokens=4, sampling=GREEDY, speculate="off")
        for cut in range(min(ATTEMPTS, len(prompt))):  # a reply may end early; another prompt makes another one
            step.program.times(True)
            watch, most = Watch(), tokens + 2 - len(kept.walls)
            taken = step.program.ahead[0]
            with watching(watch):
                runtime.generate(prompt[: len(prompt) - cut], max_tokens=most, sampling=GREEDY, speculate="off")
            kept.add(watch, step.program.ahead[0] - taken)
            if len(kept.walls) >= tokens:
                break
    finally:
        model.runs_ahead = before
        step.program.times(False)
    if not kept.walls:
        raise ValueError("no step ran in the native pass")
    return Breakdown(
        threads=native.ops().set_threads(0),
        steps=len(kept.walls),
        whole=statistics.median(kept.walls),
        phases=_medians(kept.phases),
        around=_medians(kept.around),
        rest=statistics.median(kept.rests),
        read=traffic.step(len(prompt) + 1, tokens),
        bandwidth=bandwidth,
        ahead=kept.ahead / len(kept.walls),
    )


class Kept:
    """Steps of several replies: not the first, which takes the prompt in, nor the last, which ends the request."""

    def __init__(self) -> None:
        self.walls: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.around: list[dict[str, float]] = []
        self.rests: list[float] = []
        self.ahead = 0

    def add(self, watch: Watch, taken: int) -> None:
        """Of a reply; `taken`: passes of it that were begun ahead."""
        steps = range(1, len(watch.steps) - 1)
        mostly = 2 * taken > len(steps)
        for index in steps:
            around, phases, wall = {**watch.steps[index]}, watch.phases[index], watch.walls[index]
            # Beside a pass nobody waits for the question where time went.
            wall -= 0.0 if mostly else watch.asides[index]
            between = wall - sum(around.values()) - (watch.asides[index] if mostly else 0.0)
            call = around.pop(NATIVE)
            around |= {WAITING: call} if mostly else {NATIVE: call - sum(phases.values())}
            self.around.append({**around, BETWEEN: between})
            self.phases.append(phases)
            self.walls.append(wall)
            self.rests.append(wall - _products(phases) - phases.get(ATTENTION, 0.0))
        self.ahead += min(taken, len(steps))


def _model_of(runtime: Runtime) -> Transformer:
    model = runtime._engine().model
    if not isinstance(model, Transformer):
        raise ValueError("it has no native pass")
    return model


def _products(phases: dict[str, float]) -> float:
    return sum(phases.get(name, 0.0) for name in PRODUCTS)


def _medians(parts: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: statistics.median(part.get(name, 0.0) for part in parts) for name in names}


def text_of(found: Breakdown) -> str:
    """A table, the products first."""
    order = sorted((name for name in found.phases if found.phases[name]), key=lambda name: name not in PRODUCTS)
    table = Table([left("part"), right("us"), right("%")], caption=f"{found.threads} threads")
    for name, seconds in [*((name, found.phases[name]) for name in order), *found.around.items()]:
        table.add(name, f"{seconds * 1e6:.1f}", f"{100 * seconds / found.whole:.2f}")
    floor = found.read / found.bandwidth
    python = f"Python around the pass: {short(found.python * 1e3)} ms"
    if found.ahead:
        python += f", beside it in {100 * found.ahead:.0f} % of the steps, which were begun ahead"
    return "\n".join(
        [
            table.text(),
            f"a step: {short(found.whole * 1e3)} ms, of it products {short(found.products * 1e3)}, attention "
            f"{short(found.attention * 1e3)}, everything else {short(found.rest * 1e3)}",
            python,
            f"it reads {found.read / 1e6:.0f} MB, {short(floor * 1e3)} ms at {found.bandwidth / 1e9:.1f} GB/s: "
            f"{100 * floor / found.whole:.0f} % of the bandwidth of memory",
        ]
    )


def facts_of(found: Breakdown) -> dict[str, object]:
    """The same for programs, in seconds and bytes."""
    return {
        "threads": found.threads,
        "steps": found.steps,
        "step_seconds": found.whole,
        "products_seconds": found.products,
        "attention_seconds": found.attention,
        "rest_seconds": found.rest,
        "python_seconds": found.python,
        "begun_ahead": found.ahead,
        "phases": found.phases,
        "around": found.around,
        "bytes_per_step": found.read,
        "bandwidth": found.bandwidth,
    }
