"""One step after another: schedule, compute, draw, turn tokens into text, end what has ended.

Single-threaded and without a queue of its own; `generator.py` puts threads around it. A sequence gives its pages
back in `_retire`, the one way out, whether it finished or failed.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from ..cache.pages import PageTable
from ..cache.storage import KVStorage
from ..cache.window import Cut
from ..errors import CacheFull
from ..sampling.draw import Draw
from .request import RequestState, StopReason, TokenLogprob
from .runner import Runner
from .scheduler import Chunk, Scheduler, Step
from .sequence import Sequence
from .stream import Dropped, Event, Failed, Finished, Prefilled, Started, Text


@dataclass(slots=True)
class Totals:
    """Counters over all ended requests, and over all steps."""

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0


class Engine:
    """`cut(length, keep)` says what leaves a full context of `context` tokens; `clock()` is in seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        kv: KVStorage,
        *,
        context: int,
        cut: Callable[[int, int], Cut],
        clock: Callable[[], float],
    ) -> None:
        self.scheduler = scheduler
        self.totals = Totals()
        self._table: PageTable = scheduler.table
        self._runner = runner
        self._kv = kv
        self._context = context
        self._cut = cut
        self._clock = clock

    def step(self, events: list[Event]) -> None:
        """One forward pass over everything that can run; what came of it is appended to `events`."""
        step = self.scheduler.schedule()
        self._announce(step, events)
        if step.prefill or step.decode:
            self.totals.steps += 1
            self._execute(step.chunks, events)
        elif self.scheduler.busy and not step.stuck:
            raise RuntimeError("the scheduler has requests but runs none of them")

    def end(self, sequence: Sequence, reason: StopReason, events: list[Event]) -> None:
        """End a sequence from outside, between two steps; what it generated so far is its result."""
        self._finish(sequence, reason, "", events)

    def _announce(self, step: Step, events: list[Event]) -> None:
        self.totals.preemptions += len(step.preempted)
        for sequence in step.admitted:
            if sequence.started is not None:
                continue
            sequence.started = self._clock()
            if sequence.dropped_tokens or sequence.request.dropped_turns:
                events.append(Dropped(sequence.id, sequence.dropped_tokens, sequence.request.dropped_turns))
            events.append(Started(sequence.id, len(sequence.prompt), sequence.reused_tokens or 0))
        for sequence in step.stuck:
            if sequence.generated:
                self._finish(sequence, "context", "", events)
            else:
                self._fail(sequence, self._too_small_for(sequence), events)

    def _too_small_for(self, sequence: Sequence) -> CacheFull:
        held = self._table.pages * self._table.page_size
        return CacheFull(
            f"request {sequence.id} has {len(sequence.tokens)} tokens, the whole key/value cache holds {held}",
            hint="raise --context, or shorten the prompt",
        )

    def _execute(self, chunks: Many[Chunk], events: list[Event]) -> None:
        ready = [chunk for chunk in chunks if self._copied(chunk.sequence, events)]
        outcomes = self._runner.run(ready) if ready else []
        for chunk, outcome in zip(ready, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._fail(chunk.sequence, outcome, events)
                continue
            try:
                self.scheduler.commit(chunk)
                if outcome is not None:
                    self._advance(chunk.sequence, outcome, events)
            except Exception as err:  # its owner gets it; the neighbours go on
                self._fail(chunk.sequence, err, events)

    def _copied(self, sequence: Sequence, events: list[Event]) -> bool:
        """Carry out the copy a sequence waits for. False when that failed, and with it the request."""
        if (copy := sequence.copy) is None:
            return True
        try:
            self._kv.copy_page(copy.source, copy.target, copy.tokens)
        except Exception as err:
            self._fail(sequence, err, events)
            return False
        self.scheduler.settle(sequence)
        return True

    def _advance(self, sequence: Sequence, draw: Draw, events: list[Event]) -> None:
        """A token was drawn: note it, turn it into text, see whether it was the last."""
        sequence.generated.append(draw.id)
        sequence.tokens.append(draw.id)
        if sequence.request.sampling.logprobs:
            sequence.logprobs.append(TokenLogprob(draw.id, draw.logprob, draw.top))
        if sequence.state is RequestState.PREFILL:
            sequence.move(RequestState.DECODE)
        if sequence.first_token is None:
            sequence.first_token = self._clock()
            events.append(Prefilled(sequence.id, sequence.first_token - sequence.started))
        reason: StopReason | None = sequence.stop_ids.reason(draw.id)
        text = ""
        if reason is None:
            text = sequence.stop_text.push(sequence.detokenizer.push(draw.id))
            if sequence.stop_text.stopped:
                reason = "stop"
            elif len(sequence.generated) >= sequence.limit:
                reason = "length"
            elif len(sequence.tokens) >= self._context and sequence.request.overflow != "window":
                reason = "context"
        if reason is not None:
            self._finish(sequence, reason, text, events)
            return
        if text:
            self._report(sequence, text, events)
        if len(sequence.tokens) >= self._context:
            self._move_window(sequence, events)

    def _move_window(self, sequence: Sequence, events: list[Event]) -> None:
        """Let old tokens go; those that stay get new positions, so they are computed again."""
        gone = self._cut(len(sequence.tokens), sequence.request.keep)
        self.scheduler.requeue(sequence)
        del sequence.tokens[gone.start : gone.stop]
        sequence.dropped_tokens += gone.tokens
        events.append(Dropped(sequence.id, gone.tokens, 0))

    def _report(self, sequence: Sequence, text: str, events: list[Event]) -> None:
        sequence.text.append(text)
        first, sequence.reported = sequence.reported, len(sequence.generated)
        ids = tuple(sequence.generated[first:])
        logprobs = tuple(sequence.logprobs[first:]) if sequence.request.sampling.logprobs else None
        events.append(Text(sequence.id, text, ids, logprobs))

    def _finish(self, sequence: Sequence, reason: StopReason, text: str, events: list[Event]) -> None:
        """End a request well; `text` is what its last token gave."""
        try:
            text += sequence.stop_text.push(sequence.detokenizer.finish()) + sequence.stop_text.finish()
        except Exception as err:
            self._fail(sequence, err, events)
            return
        self._retire(sequence, RequestState.FINISHED)
        if text or sequence.reported < len(sequence.generated):
            self._report(sequence, text, events)
        events.append(Finished(sequence.id, sequence.result(reason, self._clock())))

    def _fail(self, sequence: Sequence, error: Exception, events: list[Event]) -> None:
        self._retire(sequence, RequestState.FAILED)
        events.append(Failed(sequence.id, error))

    def _retire(self, sequence: Sequence, state: RequestState) -> None:
        # What a failed request computed is in doubt: nobody shall find it.
        self.scheduler.remove(sequence, state, forget=state is RequestState.FAILED)
        self.totals.requests += 1
        self.totals.prompt_tokens += len(sequence.prompt)
        self.totals.reused_tokens += sequence.reused_tokens or 0
        self.totals.generated_tokens += len(sequence.generated)
