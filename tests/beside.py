"""Requests that come and go beside those that a test looks at."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import exl_runtime as exl


@contextmanager
def others(rt: exl.Runtime, text: str, sampling: exl.SamplingParams, *, most: int) -> Iterator[None]:
    """While the block runs, one request after another from a thread, each of another text and 1 to `most` tokens."""
    stop = threading.Event()

    def noise() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            rt.generate(f"{count}. {text}", max_tokens=count % most + 1, sampling=sampling)

    beside = threading.Thread(target=noise)
    beside.start()
    try:
        yield
    finally:
        stop.set()
        beside.join()
