"""The CUDA kernels for tests: on the CPU by emulation everywhere, and on a card under `-m gpu`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from exl_runtime.errors import BackendUnavailable, BuildError
from exl_runtime.ops import native

FORWARD, REVERSE, RANDOM = 0, 1, 2


@dataclass(frozen=True)
class Card:
    """Where the kernels run: `device` for tensors, `ops` for operators."""

    device: torch.device
    ops: Any
    emulated: bool

    def on(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors, on the card."""
        return tuple(t.to(self.device) for t in tensors)

    def every_order(self, run: Callable[[], Any], seeds: int = 3) -> Any:
        """The result of `run`, which must not depend on the order of threads and blocks by a single bit.

        Emulated: forward, reverse and `seeds` random orders. On a card: as many runs.
        """
        results = []
        for order, seed in [(FORWARD, 0), (REVERSE, 0), *((RANDOM, seed) for seed in range(seeds))]:
            if self.emulated:
                self.ops.emulation_order(order, seed)
            try:
                results.append(_copies(run()))
            finally:
                if self.emulated:
                    self.ops.emulation_order(FORWARD, 0)
            for which, (first, now) in enumerate(zip(results[0], results[-1], strict=True)):
                same = torch.equal(first.view(torch.uint8), now.view(torch.uint8))
                assert same, f"result {which} depends on the order of threads (order {order}, seed {seed})"
        return results[0] if len(results[0]) > 1 else results[0][0]


def build_ahead() -> list[Callable[[], object]]:
    return [native.emulate_cuda]


def _copies(result: Any) -> list[torch.Tensor]:
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    return [t.detach().cpu().clone().contiguous() for t in tensors]


@pytest.fixture(scope="session")
def emulated() -> Card:
    """The kernels on the CPU. After this, the backend "cuda" works with the device "cpu" in this process."""
    try:
        native.emulate_cuda()
    except BuildError:
        raise  # a compiler is here and the kernels do not build: that is a failure, nothing to skip over
    except BackendUnavailable as err:
        pytest.skip(str(err))
    device = torch.device("cpu")
    return Card(device=device, ops=native.cuda_ops(device), emulated=True)


@pytest.fixture(params=["emulated", pytest.param("hardware", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    """Where a kernel test runs: emulated, and under `-m gpu` on the card of this machine."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulated")
        return
    device = torch.device("cuda")
    if (why := native.cuda_refusal(device)) is not None:
        pytest.fail(why)
    yield Card(device=device, ops=native.cuda_ops(device), emulated=False)
    torch.cuda.synchronize()
