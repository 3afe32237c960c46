"""The events of one reply, put together as they come: what is known of it at any moment. Knows no conversation."""

import time
from collections.abc import Callable

from ..generation.request import Result
from ..generation.stream import Dropped, Event, Finished, Prefilled, Started, Text


class Collected:
    """The events of one reply so far, and the result they amount to if no more come."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.request_id = ""
        self.complete = False
        self._clock = clock
        self._began = clock()
        self._prefilled: float | None = None
        self._prompt = self._reused = self._dropped = self._dropped_turns = 0
        self._text: list[str] = []
        self._ids: list[int] = []
        self._result: Result | None = None

    def take(self, event: Event) -> None:
        """The next event."""
        self.request_id = event.request_id
        if isinstance(event, Started):
            self._prompt, self._reused, self._began = event.prompt_tokens, event.reused_tokens, self._clock()
        elif isinstance(event, Prefilled):
            self._prefilled = event.seconds
        elif isinstance(event, Text):
            self._text.append(event.text)
            self._ids += event.ids
        elif isinstance(event, Dropped):
            self._dropped += event.tokens
            self._dropped_turns += event.turns
        elif isinstance(event, Finished):
            self._result, self.complete = event.result, True

    def result(self) -> Result:
        """The result of the request, or what it would be if it had been stopped now."""
        if self._result is not None:
            return self._result
        seconds = self._clock() - self._began
        prefill = seconds if self._prefilled is None else self._prefilled
        return Result(
            text="".join(self._text),
            ids=tuple(self._ids),
            stop_reason="cancelled",
            prompt_tokens=self._prompt,
            reused_tokens=self._reused,
            generated_tokens=len(self._ids),
            seconds_prefill=prefill,
            seconds_decode=max(0.0, seconds - prefill),
            dropped_tokens=self._dropped,
            dropped_turns=self._dropped_turns,
        )
