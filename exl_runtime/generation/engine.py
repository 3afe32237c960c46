"""One step after another: guess, schedule, compute, draw, turn tokens into text, end what has ended.

Single-threaded and without a queue of its own; `generator.py` puts threads around it. A sequence gives its pages
back in `_retire`, the one way out, whether it finished or failed.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..cache.pages import PageTable
from ..cache.storage import KVStorage
from ..cache.window import Cut
from ..errors import CacheFull, UsageError
from ..model.step import NO_MORE, Onward
from ..sampling.draw import Draw, with_logprobs
from ..sampling.sampler import Sampler
from .decoding import Decoder
from .onward import onward
from .request import RequestState, StopReason, TokenLogprob
from .runner import How, Outcome, Runner
from .scheduler import Chunk, Scheduler, Step
from .sequence import Sequence
from .speculation import Speculator
from .stops import is_loop
from .stream import Dropped, Event, Failed, Finished, Prefilled, Started, Text

REWINDS = 1000  # of one request, because of banned strings; beyond that it cannot do without them


@dataclass(slots=True)
class Totals:
    """Counters over all ended requests, and over all steps."""

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Engine:
    """`cut(length, keep)` says what leaves a full context of `context` tokens; `clock()` is in seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        kv: KVStorage,
        speculator: Speculator,
        *,
        context: int,
        cut: Callable[[int, int], Cut],
        clock: Callable[[], float],
        decoder: Decoder | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.totals = Totals()
        self._table: PageTable = scheduler.table
        self._runner = runner
        self._kv = kv
        self._speculator = speculator
        self._context = context
        self._cut = cut
        self._clock = clock
        self._decoder = decoder

    def step(self, events: list[Event]) -> None:
        """One forward pass over everything that can run; what came of it is appended to `events`."""
        begun = self._clock()
        if not self.scheduler.closed:
            self._runner.halt()  # a newcomer is in the next pass, and may have pages copied
        self._speculator.plan(self.scheduler.running)
        step = self.scheduler.schedule()
        self._announce(step, events)
        self._speculator.fill(step.decode)
        if step.prefill or step.decode:
            self.totals.steps += 1
            guessed = None if step.prefill else self._speculator.kind(step.decode)
            before = sum(len(sequence.generated) for sequence in step.decode)
            self._execute(step.chunks, events)
            if guessed is not None:
                tokens = sum(len(sequence.generated) for sequence in step.decode) - before
                seconds = self._clock() - begun
                self._speculator.worth.observe(len(step.decode), guessed=guessed, tokens=tokens, seconds=seconds)
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
            sequence.told = sequence.left
            dropped = sequence.dropped_tokens + sequence.left
            if dropped or sequence.request.dropped_turns:
                events.append(Dropped(sequence.id, dropped, sequence.request.dropped_turns))
            events.append(Started(sequence.id, len(sequence.prompt), sequence.reused_tokens or 0))
        for sequence in self.scheduler.running:
            if sequence.left > sequence.told and sequence.started is not None:
                events.append(Dropped(sequence.id, sequence.left - sequence.told, 0))
                sequence.told = sequence.left
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
        outcomes = self._outcomes(ready) if ready else []
        self._speculator.follow(ready)
        for chunk, outcome in zip(ready, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._fail(chunk.sequence, outcome, events)
                continue
            try:
                self._settle(chunk, outcome, events)
            except Exception as err:  # its owner gets it; the neighbours go on
                self._fail(chunk.sequence, err, events)

    def _outcomes(self, chunks: Many[Chunk]) -> list[Outcome]:
        """The logits of a pass, or the tokens where the device or the native pass draws them itself."""
        if self._decoder is not None and (drawn := self._decoder.run(chunks)) is not None:
            return [[token] for token in drawn]
        hows = self._hows(chunks)
        outcomes = None if hows is None else self._runner.draw(chunks, hows, self._onward(chunks))
        return self._runner.run(chunks) if outcomes is None else outcomes

    def _hows(self, chunks: Many[Chunk]) -> list[How] | None:
        """How all tokens of a pass may be drawn without looking at logits; None if one of them cannot."""
        if not self._runner.draws:
            return None
        hows: list[How] = []
        for chunk in chunks:
            sequence, sampler = chunk.sequence, chunk.sequence.sampler
            if sequence.steering is not None or sequence.shadow is not None or sequence.bans is not None:
                return None
            if type(sampler) is not Sampler or sequence.scores_prompt:
                return None
            index = len(sequence.generated)
            for place in range(index, index + chunk.rows):
                if (how := sampler.by_kernel(place)) is None:
                    return None
                hows.append(how)
        return hows

    def _onward(self, chunks: Many[Chunk]) -> Onward:
        """What of the next step can be begun already, given that `_hows` found a way for this one."""
        if not self.scheduler.closed:
            return NO_MORE
        return onward(chunks, page_size=self._kv.page_size, context=self._context)

    def _settle(self, chunk: Chunk, rows: Tensor | list[int] | None, events: list[Event]) -> None:
        """A chunk is computed: draw behind it, and behind each of its guesses while the draw before is that guess."""
        sequence, base = chunk.sequence, chunk.stop
        if sequence.scores_prompt and isinstance(rows, Tensor):
            _score(chunk, rows)
        last = chunk.wants_logits  # before tokens are added
        self.scheduler.commit(chunk)
        if not last:
            return
        assert rows is not None
        accepted, sequence.drafted_tokens = 0, sequence.drafted_tokens + len(chunk.draft)
        drawn = isinstance(rows, list)
        for place, guess in enumerate((*chunk.draft, None), len(rows) - 1 - len(chunk.draft)):
            row = rows[place]  # walking over a tensor would make all rows, and slowly
            draw = Draw(row) if drawn else self._draw(sequence, row)
            right = draw.id == guess
            accepted += right
            sequence.accepted_tokens += right
            self._advance(sequence, draw, events)
            if not right or sequence.state is not RequestState.DECODE:
                break
            # The guess was right: its keys and values are there already.
            self.scheduler.commit(Chunk(sequence, sequence.kv_length, sequence.kv_length + 1))
        if sequence.room:
            self._speculator.learn(sequence, len(chunk.draft), accepted, base)
            if sequence.state is RequestState.DECODE:
                self.scheduler.trim(sequence)

    def _draw(self, sequence: Sequence, row: Tensor) -> Draw:
        sampler, steering = sequence.sampler, sequence.steering
        if sequence.bans is not None:
            sequence.sampler_states.append(sampler.state())
        if sequence.shadow is not None:
            compute = partial(self._runner.last_logits, mix=sequence.request.lora)
            row = sequence.shadow.guided(row, sequence.generated, compute=compute)
        if steering is None:
            return sampler.sample(row, sequence.prompt, sequence.generated)
        shaped = steering.shape(row, sequence.tokens, len(sequence.generated))
        draw = sampler.sample(shaped, sequence.prompt, sequence.generated)
        steering.accept(draw.id)
        return draw if shaped is row else sampler.judge(draw.id, row)

    def _copied(self, sequence: Sequence, events: list[Event]) -> bool:
        """Carry out the copy a sequence waits for. False when that failed, and with it the request."""
        if not sequence.copies:
            return True
        self._runner.halt()
        for copy in sequence.copies:
            try:
                self._kv.copy_page(copy.source, copy.target, copy.tokens, copy.pool)
            except Exception as err:
                self._fail(sequence, err, events)
                return False
            if self._speculator.drafter is not None:
                self._speculator.drafter.copy(copy)
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
            pieces = [sequence.detokenizer.push(draw.id)]
            if sequence.bans is not None:
                place = sequence.bans.push(pieces[0])
                if place is not None:
                    self._rewind(sequence, sequence.settled + place)
                    return
                pieces = sequence.bans.release()
            text = sequence.tell(pieces)
            reason = self._why_it_ends(sequence)
        if reason is not None:
            self._finish(sequence, reason, text, events)
            return
        if text:
            self._report(sequence, text, events)
        if sequence.roll is None and len(sequence.tokens) >= self._context:
            self._move_window(sequence, events)

    def _why_it_ends(self, sequence: Sequence) -> StopReason | None:
        loop = sequence.request.stop_loop
        if sequence.stop_text.stopped or (sequence.steering is not None and sequence.steering.finished):
            return "stop"
        if len(sequence.generated) >= sequence.limit:
            return "length"
        if len(sequence.tokens) >= self._context and sequence.request.overflow != "window":
            return "context"
        return "loop" if loop is not None and is_loop(sequence.generated, *loop) else None

    def _rewind(self, sequence: Sequence, index: int) -> None:
        """Take the reply back to before token `index`, which began a banned string, and never draw it there again.

        The sequence queues as one that yielded its pages: what it keeps is found in the cache, by the rules that let
        others share it, and only the last of it is computed again.
        """
        sequence.rewinds += 1
        if sequence.rewinds > REWINDS:
            raise UsageError(
                f"the reply was taken back {REWINDS} times because of banned strings",
                hint="ban less: the model has little else to say here",
            )
        self._runner.halt()
        self.scheduler.requeue(sequence)
        sequence.take_back(index)

    def _move_window(self, sequence: Sequence, events: list[Event]) -> None:
        """Let old tokens go where the context has too few pages to roll: what stays is computed again."""
        gone = self._cut(len(sequence.tokens), sequence.request.keep)
        self._runner.halt()
        self.scheduler.requeue(sequence)
        del sequence.tokens[gone.start : gone.stop]
        sequence.index = None
        sequence.dropped_tokens += gone.tokens
        events.append(Dropped(sequence.id, gone.tokens, 0))

    def _report(self, sequence: Sequence, text: str, events: list[Event]) -> None:
        sequence.text.append(text)
        first, sequence.reported = sequence.reported, sequence.settled
        ids = tuple(sequence.generated[first : sequence.reported])
        logprobs = sequence.logprobs[first : sequence.reported]
        told = tuple(logprobs) if sequence.request.sampling.logprobs else None
        events.append(Text(sequence.id, text, ids, told))

    def _finish(self, sequence: Sequence, reason: StopReason, text: str, events: list[Event]) -> None:
        """End a request well; `text` is what its last token gave."""
        try:
            text += sequence.close()
        except Exception as err:
            self._fail(sequence, err, events)
            return
        if sequence.stop_text.stopped:
            reason = "stop"
        self._retire(sequence, RequestState.FINISHED)
        if text or sequence.reported < len(sequence.generated):
            self._report(sequence, text, events)
        events.append(Finished(sequence.id, sequence.result(reason, self._clock())))

    def _fail(self, sequence: Sequence, error: Exception, events: list[Event]) -> None:
        self._retire(sequence, RequestState.FAILED)
        events.append(Failed(sequence.id, error))

    def _retire(self, sequence: Sequence, state: RequestState) -> None:
        self._runner.halt()
        if self._decoder is not None:
            self._decoder.forget(sequence)
        # What a failed request computed is in doubt: nobody shall find it.
        if state is RequestState.FINISHED and not sequence.copies:
            self._speculator.leave(sequence)
        self.scheduler.remove(sequence, state, forget=state is RequestState.FAILED)
        self.totals.drafted_tokens += sequence.drafted_tokens
        self.totals.accepted_tokens += sequence.accepted_tokens
        self.totals.requests += 1
        self.totals.prompt_tokens += len(sequence.prompt)
        self.totals.reused_tokens += sequence.reused_tokens or 0
        self.totals.generated_tokens += len(sequence.generated)


def _score(chunk: Chunk, rows: Tensor) -> None:
    """Note the log-probabilities of the prompt's tokens that these logits speak of."""
    sequence = chunk.sequence
    first = len(sequence.prompt_scores) + 1
    for token, row in zip(sequence.prompt[first:], rows[first - 1 - chunk.start :], strict=False):
        draw = with_logprobs(token, row.numpy(), sequence.request.prompt_logprobs)
        sequence.prompt_scores.append(TokenLogprob(draw.id, draw.logprob or 0.0, draw.top))
