"""One model and its peers from their folders to a finished race. Knows no argparse."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from exl_runtime.console.progress import Progress
from exl_runtime.runtime import Runtime

from .bandwidth import Bandwidth
from .contestant import Contestant, Ours, peak_device, peak_resident
from .peers import open_peer
from .race import Race, race, steps_of
from .report import Setup
from .traffic import spec_of, traffic_of
from .workload import Prompts, Workload, prompts_of

OpenBandwidth = Callable[[torch.device], Callable[[], float]]
FRESH = 1 << 40  # runs that no race gets to: prompts for the first warm-up


def sprint(
    runtime: Runtime,
    load: Workload,
    threads: Sequence[int | None],
    peers: Sequence[tuple[str, Path]],
    progress: Progress,
    *,
    base_bytes: int,
    open_bandwidth: OpenBandwidth = lambda device: Bandwidth(device).measure,
) -> tuple[Race, Setup]:
    """Measure an opened model, and peers beside it. `base_bytes`: peak of resident memory before it was opened.

    Raises UsageError when sequences do not fit, EvalError for a peer that cannot run. Ctrl-C during the measured runs
    gives what there is, or passes on when there is nothing.
    """
    device = torch.device(runtime.info.device)
    vocabulary = plain_ids(runtime)

    def prompts(run: int) -> Prompts:
        return prompts_of(load, run, vocabulary)

    ours = Ours(runtime)
    progress.say("warming up")
    ours.prepare(load, prompts(FRESH))
    peak, peak_gpu = peak_resident(), peak_device(device)  # before anything else takes memory
    with ExitStack() as open_ones:
        contestants: list[Contestant] = [ours]
        for name, path in peers:
            progress.say(f"opening {name}: {path}")
            peer = open_peer(name, path, device)
            open_ones.callback(peer.close)
            contestants.append(peer)
        bandwidth = open_bandwidth(device)
        with progress.stage("measuring", steps_of(load, len(contestants), len(threads)), "steps") as stage:
            found = race(
                contestants,
                load,
                threads,
                prompts=prompts,
                bandwidth=bandwidth,
                advance=lambda note: stage.advance(1, note),
            )
        if found.empty:
            raise KeyboardInterrupt
        setup = Setup(
            model=runtime.info.name,
            device=_device_name(device),
            traffic=traffic_of(runtime, load.batch),
            weight_bytes=runtime.info.weight_bytes,
            cache_bytes=runtime.info.cache_bytes,
            peak_bytes=peak,
            base_bytes=base_bytes,
            peak_device_bytes=peak_gpu,
            details={one.name: dict(one.details()) for one in contestants},
        )
    return found, setup


def plain_ids(runtime: Runtime) -> list[int]:
    """Token ids that are text and nothing special, and that the model has."""
    tokenizer = runtime.tokenizer
    limit = min(spec_of(runtime).vocab_size, tokenizer.vocab_size)
    return [token for token in range(limit) if token not in tokenizer.special_ids]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
