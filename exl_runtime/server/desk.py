"""Requests on their way: how many may run and wait, and how they end when their client leaves.

Every sequence iterates its stream in a thread of its own; the runtime lets them share every step. Events come back
to the loop of the server through one queue per request.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ..generation.stream import Event
from .problems import ApiError


class Desk:
    """Admits requests while there is room. `running` sequences at once, `waiting` more in the queue."""

    def __init__(self, runtime: Any, *, running: int, waiting: int) -> None:
        self.runtime = runtime
        self.most = running + waiting
        self._threads = ThreadPoolExecutor(running, thread_name_prefix="exl-reply")
        self._open = True
        self._batches: set[Batch] = set()

    @property
    def pending(self) -> int:
        """Sequences that run or wait."""
        return sum(batch.left for batch in self._batches)

    @property
    def open(self) -> bool:
        """False once the server is about to stop."""
        return self._open

    def admit(self, count: int) -> None:
        """Raise ApiError 429 unless there is room for `count` sequences now; 503 when the server stops."""
        if not self._open:
            raise ApiError(503, "the server is stopping", code="shutting_down")
        if count > self.most:
            raise ApiError(
                400, f"the request asks for {count} replies, the server takes {self.most} at once", param="n"
            )
        if self.pending + count > self.most:
            raise ApiError(
                429,
                f"the queue is full: {self.pending} replies run or wait",
                code="queue_full",
                headers={"retry-after": "2"},
            )

    def start(self, orders: Sequence[dict[str, Any]]) -> "Batch":
        """Start one sequence per order; an order holds the arguments of `Runtime.stream`. Raises as `admit`."""
        self.admit(len(orders))
        batch = Batch(self, len(orders))
        self._batches.add(batch)
        for index, order in enumerate(orders):
            batch.jobs.append(Job(batch, index, order))
        return batch

    def submit(self, job: "Job") -> "Future[None]":
        """Have a thread work on a job, in order of arrival."""
        return self._threads.submit(job.work)

    def leave(self, batch: "Batch") -> None:
        """All sequences of a batch have ended."""
        self._batches.discard(batch)

    def shut(self) -> None:
        """Admit nothing more; what runs and waits goes on."""
        self._open = False

    def cancel(self) -> None:
        """End everything in good order: clients get what there is."""
        for batch in tuple(self._batches):
            batch.cancel()

    async def close(self) -> None:
        """Admit nothing more, cancel everything, and wait until the threads have let go of the model."""
        self.shut()
        self.cancel()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)


class Batch:
    """The sequences of one HTTP request. Lives in the loop of the server."""

    def __init__(self, desk: Desk, count: int) -> None:
        self.desk = desk
        self.left = count
        self.jobs: list[Job] = []
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None

    def post(self, index: int, event: Event | Exception | None) -> None:
        """Called by the threads: an event of sequence `index`; None is its end."""
        try:
            self._loop.call_soon_threadsafe(self._take, index, event)
        except RuntimeError:  # the loop is closed: nobody is interested any more
            self.jobs[index].cancel()

    async def begun(self, patience: float) -> None:
        """Wait for the first event, at most `patience` seconds. Raises the error of a sequence that failed by then:
        before anything was sent an error can still have its own status."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), patience)
        if self._error is not None:
            self.cancel()
            raise self._error

    async def events(self, patience: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """Events and whose they are, until all sequences have ended; None whenever `patience` seconds bring nothing.

        Raises the error of a sequence, after which the others are cancelled.
        """
        while self.left or not self._news.empty():
            try:
                index, event = await asyncio.wait_for(self._news.get(), patience)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                self.cancel()
                raise event
            if event is not None:
                yield index, event

    def cancel(self) -> None:
        """End all sequences in good order: each still reports Finished. Those that wait simply never start."""
        for job in self.jobs:
            job.cancel()

    def _take(self, index: int, event: Event | Exception | None) -> None:
        if event is None:
            self.left -= 1
            if not self.left:
                self.desk.leave(self)
        elif isinstance(event, Exception) and self._error is None:
            self._error = event
        self._news.put_nowait((index, event))
        self._arrived.set()


class Job:
    """One sequence: a stream of the runtime, iterated in a thread."""

    def __init__(self, batch: Batch, index: int, order: dict[str, Any]) -> None:
        self._batch = batch
        self._index = index
        self._order = order
        self._stream: Any = None
        self._cancelled = False
        self._future = batch.desk.submit(self)

    def work(self) -> None:
        """The thread's part."""
        batch, index = self._batch, self._index
        try:
            if not self._cancelled:
                self._stream = batch.desk.runtime.stream(**self._order)
                if self._cancelled:  # meanwhile
                    self._stream.cancel()
                for event in self._stream:
                    batch.post(index, event)
        except Exception as err:
            batch.post(index, err)
        finally:
            self._stream = None
            batch.post(index, None)

    def cancel(self) -> None:
        """End the sequence. Safe from any thread, at any time, more than once."""
        if self._cancelled:
            return
        self._cancelled = True
        if self._future.cancel():  # it had not begun, and now never will
            self._batch.post(self._index, None)
        elif (stream := self._stream) is not None:
            stream.cancel()
