"""A contestant of a race that takes the time it is told to, and notes what it was asked."""

from collections.abc import Sequence

from eval.speed.workload import Prompts, Workload

LOAD = Workload(prompt=64, generate=32, runs=2)


class Fake:
    """stop_at: a line of the log at whose second occurrence the user ends it."""

    def __init__(self, name: str, log: list[str], seconds: float = 1.0, stop_at: str = "") -> None:
        self.name, self.log, self.seconds, self.stop_at = name, log, seconds, stop_at
        self.threads: int | None = None

    def _note(self, what: str) -> float:
        self.log.append(f"{self.name} {what}")
        if self.log[-1] == self.stop_at and self.log.count(self.stop_at) == 2:
            raise KeyboardInterrupt
        return self.seconds

    def set_threads(self, count: int) -> None:
        self.threads = count

    def prepare(self, load: Workload, prompts: Prompts) -> None:
        self._note(f"warm {self.threads}")

    def cold(self, prompts: Sequence[tuple[int, ...]]) -> float:
        return self._note("cold")

    def turn(self, prompts: Sequence[tuple[int, ...]]) -> float:
        return self._note("turn") / 4

    def decode(self, prompts: Sequence[tuple[int, ...]], tokens: int, *, known: bool) -> float:
        assert known and tokens == LOAD.generate
        return self._note("decode") * 2

    def details(self) -> dict[str, object]:
        return {"version": "1"}

    def close(self) -> None:
        self.log.append(f"{self.name} closed")
