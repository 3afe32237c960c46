"""`graph.Recorder` on CUDA: torch's CUDA graphs, pinned memory and events. Runs on hardware only."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .fused import FusedTransformer

WARM_UPS = 2  # the first run makes workspaces and handles, the second is as all later ones


class CudaFetch:
    """Numbers in pinned memory, and the event after which they are there."""

    def __init__(self, source: Tensor) -> None:
        self._numbers = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._numbers.copy_(source, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record(torch.cuda.current_stream(source.device))

    def wait(self) -> list[int]:
        """Them; blocks until the device has written them."""
        self._there.synchronize()
        numbers: list[int] = self._numbers.tolist()
        return numbers


class CudaRecorder:
    """One per model: all its graphs share one pool of memory, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def why_not(self) -> str | None:
        """See `graph.Recorder`."""
        return None

    def record(self, warm_up: Callable[[], None], body: Callable[[], None]) -> Callable[[], None]:
        """See `graph.Recorder`. Both run on a stream of their own, as capturing demands."""
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                warm_up()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: only what this one does must be fit for recording.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"),
        ):
            body()
        return graph.replay

    def upload(self, values: Sequence[int], target: Tensor) -> None:
        """See `graph.Recorder`. Pinned, so that the host does not wait; torch keeps the buffer until it is read."""
        numbers = torch.tensor(values, dtype=target.dtype).view(target.shape).pin_memory()
        target.copy_(numbers, non_blocking=True)

    def fetch(self, source: Tensor) -> CudaFetch:
        """See `graph.Recorder`."""
        return CudaFetch(source)


def recorder_for(model: object) -> CudaRecorder | None:
    """What records the decode steps of `model`; None where every step runs as usual."""
    if isinstance(model, FusedTransformer) and model.device.type == "cuda":
        return CudaRecorder(model.device)
    return None
