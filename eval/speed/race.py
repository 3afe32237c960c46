"""Everyone in turn, again and again: run i of one, run i of the next, so that what drifts hits all of them alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .contestant import Contestant
from .workload import Prompts, Workload

PHASES = 3  # of one run of one contestant: cold, turn, decode
Advance = Callable[[str], None]


@dataclass(slots=True)
class Samples:
    """Seconds of one contestant, one entry per run. cold, turn: to the first token. decode: of all timed steps."""

    cold: list[float] = field(default_factory=list)
    turn: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Heat:
    """All runs with one number of threads; None: as torch has it. bandwidth: bytes per second, one entry per run."""

    threads: int | None
    samples: dict[str, Samples]
    bandwidth: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Race:
    """partial: the user ended it early; whatever was measured by then is in it."""

    load: Workload
    heats: list[Heat] = field(default_factory=list)
    partial: bool = False

    @property
    def empty(self) -> bool:
        """Nothing was measured at all."""
        return not any(one.cold for heat in self.heats for one in heat.samples.values())


def steps_of(load: Workload, contestants: int, heats: int) -> int:
    """How many times `advance` is called."""
    return heats * (contestants + load.runs * contestants * PHASES)


def race(
    contestants: Sequence[Contestant],
    load: Workload,
    threads: Sequence[int | None],
    *,
    prompts: Callable[[int], Prompts],
    bandwidth: Callable[[], float],
    advance: Advance = lambda note: None,
) -> Race:
    """Run `load` with every number of threads.

    prompts    of run i from 0 up; new ids for new numbers
    bandwidth  of memory, in bytes per second, measured when called
    advance    called after every step with a word on it
    Ctrl-C ends it early: the result is then `partial`.
    """
    result = Race(load)
    fresh = iter(range(1 << 62))
    try:
        for count in threads:
            heat = Heat(count, {one.name: Samples() for one in contestants})
            result.heats.append(heat)
            for one in contestants:
                if count is not None:
                    one.set_threads(count)
                one.prepare(load, prompts(next(fresh)))
                advance(f"{one.name} is warm")
            for run in range(load.runs):
                heat.bandwidth.append(bandwidth())
                asked = prompts(next(fresh))
                for one in contestants:
                    _run(
                        one,
                        load,
                        asked,
                        heat.samples[one.name],
                        lambda what, one=one, run=run: advance(f"{one.name}, run {run + 1}, {what}"),
                    )
    except KeyboardInterrupt:
        result.partial = True
    return result


def _run(one: Contestant, load: Workload, asked: Prompts, samples: Samples, advance: Advance) -> None:
    samples.cold.append(one.cold(asked.cold))
    advance("prompt")
    samples.turn.append(one.turn(asked.turn))
    advance("turn")
    samples.decode.append(one.decode(asked.deep, load.generate, known=asked.deep_is_known))
    advance("decoding")
