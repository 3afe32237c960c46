"""Who runs a workload: this runtime, or a peer behind the same few calls."""

import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from exl_runtime.cache.geometry import PAGE_SIZE
from exl_runtime.errors import UsageError
from exl_runtime.generation.request import Result
from exl_runtime.ops import native
from exl_runtime.runtime import Runtime
from exl_runtime.sampling.params import SamplingParams

from .timers import Timer, wall_timer
from .workload import Ids, Prompts, Workload

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class Contestant(Protocol):
    """Times are seconds for all sequences of a batch together. Every sequence draws greedily and never ends early."""

    name: str

    def set_threads(self, count: int) -> None:
        """CPU threads from now on."""
        ...

    def prepare(self, load: Workload, prompts: Prompts) -> None:
        """Not timed: warm up, allocate, and find the best of its settings for `load`."""
        ...

    def cold(self, prompts: Sequence[Ids]) -> float:
        """From prompts that are new to the first token of each."""
        ...

    def turn(self, prompts: Sequence[Ids]) -> float:
        """The same for prompts that begin like those of the last `cold`."""
        ...

    def decode(self, prompts: Sequence[Ids], tokens: int, *, known: bool) -> float:
        """`tokens` more tokens of each sequence after its first one; computing the prompts is not timed.

        known: the last `cold` has seen them.
        """
        ...

    def details(self) -> Mapping[str, object]:
        """Version, build, settings: what a reader needs to judge its figures."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class Ours:
    """This runtime, as a program uses it: prompts in, tokens and text out."""

    name = "exl-runtime"

    def __init__(self, runtime: Runtime, *, timer: Timer | None = None) -> None:
        self._runtime = runtime
        self._timer = timer or wall_timer()

    def set_threads(self, count: int) -> None:
        """See the protocol."""
        native.set_threads(count)

    def prepare(self, load: Workload, prompts: Prompts) -> None:
        """See the protocol."""
        pages = load.batch * -(-load.context // PAGE_SIZE)
        if pages > self._runtime.stats.pages_total:
            held = self._runtime.stats.pages_total * PAGE_SIZE
            raise UsageError(
                f"{load.batch} sequences of {load.context} tokens do not fit the cache of {held} tokens",
                hint="give a smaller --batch",
            )
        self.cold(prompts.cold)
        self.decode(prompts.deep, load.generate, known=prompts.deep_is_known)

    def cold(self, prompts: Sequence[Ids]) -> float:
        """See the protocol."""
        return self._timer(lambda: self._generate(prompts, 1))

    def turn(self, prompts: Sequence[Ids]) -> float:
        """See the protocol."""
        return self.cold(prompts)

    def decode(self, prompts: Sequence[Ids], tokens: int, *, known: bool) -> float:
        """See the protocol. The first token of all sequences comes in one step, as all prompts are known by then."""
        if not known:
            self.cold(prompts)
        return max(result.seconds_decode for result in self._generate(prompts, tokens + 1))

    def _generate(self, prompts: Sequence[Ids], tokens: int) -> list[Result]:
        # Without guesses: what a step reads is compared with the memory, and a text seen before would come for free.
        return self._runtime.generate(list(prompts), max_tokens=tokens, sampling=GREEDY, speculate="off")

    def details(self) -> Mapping[str, object]:
        """See the protocol."""
        info = self._runtime.info
        return {
            "format": info.format,
            "bits_per_weight": info.bits_per_weight,
            "backend": info.backend,
            "device": info.device,
            "cache": info.cache,
            "speculate": "off",
            "load_seconds": info.load_seconds,
            "torch": torch.__version__,
        }

    def close(self) -> None:
        """See the protocol."""
        self._runtime.close()


def peak_resident() -> int:
    """Most bytes of memory this process ever held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def peak_device(device: torch.device) -> int | None:
    """Most bytes that torch ever held on a GPU; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
