"""The events of one running request, as an iterator that can be stopped from any thread."""

import threading
from collections.abc import Callable, Generator, Iterator

from typing_extensions import Self

from ..generation import generator
from ..generation.request import Request, Result
from ..generation.stream import Event, Finished


class Stream(Iterator[Event]):
    """Iterate to run the request; the last event is Finished, and `result` is set then.

    cancel()  end the request in good order: Finished follows, with stop_reason "cancelled" and the text so far.
              Safe from another thread and from a signal handler.
    close()   walk away: no more events, the pages of the request are free at once. Safe from another thread.
              Leaving the loop early and dropping the stream does the same.
    Raises the error of the request if it fails. The request starts with the first iteration.
    """

    def __init__(self, engine: generator.Generator, request: Request) -> None:
        self.request_id = request.id
        self.result: Result | None = None
        self._generator = engine
        self._request = request
        self._events: Generator[Event, None, None] | None = None  # made by the first iteration
        self._cancelled = False
        self._closed = False
        self._turn = threading.RLock()  # held while an event is made: a generator cannot be closed meanwhile

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        with self._turn:
            if self._closed:
                raise StopIteration
            if self._events is None:
                self._events = self._generator.stream(self._request, cancelled=lambda: self._cancelled)
            event = next(self._events)
        if isinstance(event, Finished):
            self.result = event.result
        elif self._cancelled:
            self._generator.cancel(self.request_id)
        return event

    def cancel(self) -> None:
        """See the class."""
        self._cancelled = True
        self._generator.cancel(self.request_id)

    def close(self) -> None:
        """See the class."""
        self._closed = True
        self.cancel()  # another thread may be in the middle of a step; it ends the sooner
        with self._turn:
            # Running here means: we are in a signal handler amid that very step, and it will see the cancellation.
            if self._events is not None and not self._events.gi_running:
                self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CountingStream(Stream):
    """A stream whose result enters the statistics of a runtime: `count(result)`."""

    def __init__(self, engine: generator.Generator, request: Request, count: Callable[[Result], None]) -> None:
        super().__init__(engine, request)
        self._count = count

    def __next__(self) -> Event:
        event = super().__next__()
        if self.result is not None:
            self._count(self.result)
        return event
