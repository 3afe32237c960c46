"""The events of one running request, as an iterator that can be stopped from any thread."""

from collections.abc import Iterator

from typing_extensions import Self

from ..generation.generator import Generator
from ..generation.request import Request, Result
from ..generation.stream import Event, Finished


class Stream(Iterator[Event]):
    """Iterate to run the request; the last event is Finished, and `result` is set then.

    cancel()  end the request in good order: Finished follows, with stop_reason "cancelled" and the text so far.
              Safe from another thread and from a signal handler.
    close()   walk away: no more events, the pages of the request are free at once. Leaving the loop early and
              dropping the stream does the same.
    Raises the error of the request if it fails. The request starts with the first iteration.
    """

    def __init__(self, generator: Generator, request: Request) -> None:
        self.request_id = request.id
        self.result: Result | None = None
        self._generator = generator
        self._events = generator.stream(request)
        self._cancelled = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
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
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
