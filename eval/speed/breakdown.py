"""Where one decode step spends its time: the native pass by phase, everything around it by who does it.

Functions of this package's own runtime are wrapped while it is measured; a wrapped one counts what it spends itself,
not what the wrapped ones inside it spend.
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
PRODUCTS = ("project", "out", "mlp", "head")  # phases of the native pass that multiply; `attend` reads the cache
NATIVE = "native call"  # what of it is no phase: arguments and checks
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
    """Seconds of one step, medians over `steps`: `phases` of the native pass, `around` it; and bytes a step reads."""

    threads: int
    steps: int
    whole: float
    phases: dict[str, float]
    around: dict[str, float]
    read: float
    bandwidth: float

    @property
    def products(self) -> float:
        """Seconds of all matrix products."""
        return sum(self.phases.get(name, 0.0) for name in PRODUCTS)

    @property
    def attention(self) -> float:
        """Seconds of reading the cache."""
        return self.phases.get("attend", 0.0)

    @property
    def rest(self) -> float:
        """Seconds of everything that is neither."""
        return sum(self.phases.values()) + sum(self.around.values()) - self.products - self.attention


class Watch:
    """Spends of named parts in the step under way, nested ones counted once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.spent: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self.phases: list[dict[str, float]] = []
        self.decoding = False  # the step under way computed one token of every sequence
        self._clock = clock
        self._inside = [0.0]  # what wrapped functions spent inside the one under way

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
        """NativeStep.run, with its phases set apart from it."""
        counted = self.wrap(run, NATIVE)

        def timed(step: NativeStep, plan: Plan, *rest: Any) -> Any:
            self._uncounted(step)
            result = counted(step, plan, *rest)
            phases = self._uncounted(step)
            self.decoding = len(plan.tokens) == len(plan.rope_lengths)
            self.spent[NATIVE] -= sum(phases.values())
            self.phases.append(phases)
            return result

        return timed

    def _uncounted(self, step: NativeStep) -> dict[str, float]:
        """The phases since the last call; asking for them is nobody's time."""
        started = self._clock()
        phases = step.program.times(True)
        self._inside[-1] += self._clock() - started
        return phases

    def step_of(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Generator.step: the end of one is the end of a step."""
        counted = self.wrap(step, PARTS[0][2])

        def timed(*args: Any) -> Any:
            self.spent, self.decoding = {}, False
            count = len(self.phases)
            result = counted(*args)
            if self.decoding:
                self.steps.append(self.spent)
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


def break_down(runtime: Runtime, prompt: list[int], tokens: int, *, traffic: Traffic, bandwidth: float) -> Breakdown:
    """Up to `tokens` steps behind `prompt`. ValueError if the model has no native pass."""
    runtime.generate(prompt, max_tokens=4, sampling=GREEDY, speculate="off")
    steps: list[dict[str, float]] = []
    phases: list[dict[str, float]] = []
    for cut in range(min(ATTEMPTS, len(prompt))):  # a reply may end early; another prompt makes another one
        watch = Watch()
        with watching(watch):
            most = tokens + 2 - len(steps)
            runtime.generate(prompt[: len(prompt) - cut], max_tokens=most, sampling=GREEDY, speculate="off")
        # The first takes the prompt in, the last ends the request.
        steps += watch.steps[1:-1]
        phases += watch.phases[1:-1]
        if len(steps) >= tokens:
            break
    if not steps:
        raise ValueError("no step ran in the native pass")
    return Breakdown(
        threads=native.ops().set_threads(0),
        steps=len(steps),
        whole=statistics.median(
            sum(step.values()) + sum(phase.values()) for step, phase in zip(steps, phases, strict=True)
        ),
        phases=_medians(phases),
        around=_medians(steps),
        read=traffic.step(len(prompt) + 1, tokens),
        bandwidth=bandwidth,
    )


def _medians(parts: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: statistics.median(part.get(name, 0.0) for part in parts) for name in names}


def text_of(found: Breakdown) -> str:
    """A table, the products first."""
    order = sorted(found.phases, key=lambda name: name not in PRODUCTS)
    table = Table([left("part"), right("us"), right("%")], caption=f"{found.threads} threads")
    for name, seconds in [*((name, found.phases[name]) for name in order), *found.around.items()]:
        table.add(name, f"{seconds * 1e6:.1f}", f"{100 * seconds / found.whole:.2f}")
    floor = found.read / found.bandwidth
    return "\n".join(
        [
            table.text(),
            f"a step: {short(found.whole * 1e3)} ms, of it products {short(found.products * 1e3)}, attention "
            f"{short(found.attention * 1e3)}, everything else {short(found.rest * 1e3)}",
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
        "phases": found.phases,
        "around": found.around,
        "bytes_per_step": found.read,
        "bandwidth": found.bandwidth,
    }
