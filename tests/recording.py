"""A stand-in for CUDA graphs: records by keeping the work itself."""

from collections.abc import Callable, Sequence

import torch


class Snapshot:
    def __init__(self, source: torch.Tensor) -> None:
        self._numbers = source.tolist()

    def wait(self) -> list[int]:
        return self._numbers


class FakeRecorder:
    """See `model.graph.Recorder`. Counts what it is asked for; `why` and `fails` make it refuse."""

    def __init__(self, why: str | None = None) -> None:
        self.why = why
        self.recorded = self.repeated = self.uploads = 0
        self.fails = False

    def why_not(self) -> str | None:
        return self.why

    def record(self, warm_up: Callable[[], None], body: Callable[[], None]) -> Callable[[], None]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        warm_up()
        self.recorded += 1

        def repeat() -> None:
            self.repeated += 1
            body()

        return repeat

    def upload(self, values: Sequence[int], target: torch.Tensor) -> None:
        assert target.is_contiguous()
        self.uploads += 1
        target.copy_(torch.tensor(values, dtype=target.dtype).view(target.shape))

    def fetch(self, source: torch.Tensor) -> Snapshot:
        return Snapshot(source)
