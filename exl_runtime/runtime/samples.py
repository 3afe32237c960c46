"""Several replies to one prompt: requests that differ in their seed only, and so share the pages of the prompt."""

from collections.abc import Iterable
from dataclasses import replace

from ..errors import UsageError
from ..generation.request import Request

SEEDS = 2**64
MOST = 1024


def samples_of(request: Request, count: int) -> list[Request]:
    """`count` requests. With a seed, sample i has seed + i, and equals a request with that seed; else each has its own.

    The first computes the prompt, the others begin where it ends: see `Scheduler`. Raises UsageError.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        raise UsageError(f"n is {count!r}", hint=f"give a number of replies from 1 to {MOST}")
    seed = request.sampling.seed
    return [
        replace(
            request,
            id=f"{request.id}.{index}",
            sampling=request.sampling if seed is None else replace(request.sampling, seed=(seed + index) % SEEDS),
        )
        for index in range(count)
    ]


def expanded(requests: Iterable[Request], count: int) -> list[Request]:
    """The samples of several requests, one request after another."""
    return [sample for request in requests for sample in samples_of(request, count)]
