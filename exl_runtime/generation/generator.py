"""The generator: takes requests from any thread, runs them together, and hands every owner its events.

Knows no files, no chat and no kernels. What a step does is in `engine.py`; here are the threads around it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..cache.pools import Pools, unrolled
from ..cache.pools import capacity as capacity_of
from ..cache.prefix import root_key
from ..cache.sinks import SinkKeeper
from ..cache.snapshot import Contents, Snapshot
from ..cache.storage import KVStorage
from ..cache.tiers import tiers_of
from ..cache.window import roll_for
from ..errors import PromptTooLong, UsageError
from ..model.angles import key_frequencies
from ..model.graph import Recordable, Recorder
from ..model.lora import Mix
from .decoding import Decoder
from .drafting import Drafter
from .dropping import Dropper
from .engine import Engine
from .holding import hold
from .intake import Intake, MakeSampler
from .request import Request, Result
from .rolling import Roller
from .runner import Model, Runner, Visit
from .scheduler import MAX_RUNNING, PREFILL_TOKENS, Scheduler
from .sequence import Sequence
from .speculation import Speculator
from .stats import GeneratorStats
from .stream import Event, Failed, Finished

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer


ROOTS = 8  # beginnings of prefixes that are remembered: one, but for ropes that depend on the length


class Generator:
    """`submit` and `cancel` may be called from any thread at any time; `step` and `stream` take turns."""

    def __init__(
        self,
        model: Model,
        kv: KVStorage,
        tokenizer: "Tokenizer",
        *,
        context: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        max_running: int = MAX_RUNNING,
        make_sampler: MakeSampler | None = None,
        draft: tuple[Model, KVStorage] | None = None,
        recorder: Recorder | None = None,
        host_bytes: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`context`: most tokens of one sequence, prompt and reply; by default the model's, or what the cache holds.
        `draft`: a model with the same vocabulary that guesses ahead, and as many pages for it as `kv` has.
        `recorder`: records decode steps of a `model` that is `Recordable`; None: every step runs as usual.
        `host_bytes`: of host memory for what reused pages held.

        Raises UsageError when the cache cannot hold one sequence of that length.
        """
        capacity = capacity_of(kv.geometry, kv.counts)
        self.context = min(model.spec.context_length, capacity) if context is None else context
        if not 2 <= self.context <= capacity:
            raise UsageError(
                f"a context of {self.context} tokens was asked for, the key/value cache holds {capacity}",
                hint="give a context from 2 to what the cache holds",
            )
        self.model = model
        self.kv = kv
        self._below = tiers_of([kv] if draft is None else [kv, draft[1]], host_bytes=host_bytes)
        self.tiers = self._below[0]
        self.pools = Pools.fitting(kv.geometry, kv.counts, self._below, context=self.context, new=prefill_tokens)
        self.table = self.pools[0].table
        self._roots = {root_key(0): None}  # the one used last at the end
        self._clock = clock
        self._intake = Intake(
            model.spec,
            tokenizer,
            context=self.context,
            page_size=kv.page_size,
            make_sampler=make_sampler,
            drafts=draft is not None,
        )
        stores = [(kv, key_frequencies(model.spec))]
        if draft is not None:
            stores.append((draft[1], key_frequencies(draft[0].spec)))
        sinks = SinkKeeper(stores)
        self._roller, self._dropper = Roller(self.pools, sinks), Dropper(self.pools, sinks)
        self._scheduler = Scheduler(
            self.pools,
            prefill_tokens=prefill_tokens,
            max_running=max_running,
            roller=self._roller,
            dropper=self._dropper,
        )
        self._runner = Runner(model, kv)
        drafter = None if draft is None else Drafter(*draft, vocab_size=model.spec.vocab_size)
        self._speculator = Speculator(drafter, context=self.context)
        self._decoder = None
        if recorder is not None:
            recorded = cast(Recordable, model)
            self._decoder = Decoder(recorded, kv, eos_ids=self._intake.eos_ids, recorder=recorder)
        self._engine = Engine(
            self._scheduler,
            self._runner,
            kv,
            self._speculator,
            context=self.context,
            cut=self._intake.cut,
            clock=clock,
            decoder=self._decoder,
        )
        # Both reentrant: the garbage collector may close an abandoned `stream` anywhere, also inside of either.
        # Who holds the second never waits for the first.
        self._turn = threading.RLock()  # held while engine, table or model are in use
        self._occupied = False  # ... and by whom: True from the first to the last moment of a turn
        self._inbox = threading.RLock()  # held, briefly, for what follows
        self._submitted: deque[Sequence] = deque()
        self._cancelled: set[str] = set()
        self._orphans: set[str] = set()
        self._live: dict[str, Sequence] = {}
        self._boxes: dict[str, deque[Event]] = {}
        self._count = 0

    @property
    def busy(self) -> bool:
        """True while there is a request that has not ended."""
        return bool(self._live)

    @property
    def stats(self) -> GeneratorStats:
        totals, tables = self._engine.totals, [pool.table for pool in self.pools]
        return GeneratorStats(
            requests=totals.requests,
            prompt_tokens=totals.prompt_tokens,
            reused_tokens=totals.reused_tokens,
            generated_tokens=totals.generated_tokens,
            preemptions=totals.preemptions,
            steps=totals.steps,
            waiting=len(self._submitted) + len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            pages_total=sum(table.pages for table in tables),
            pages_held=sum(table.pages - table.available for table in tables),
            pages_idle=sum(table.idle for table in tables),
            drafted_tokens=totals.drafted_tokens,
            accepted_tokens=totals.accepted_tokens,
            host_tokens=max(tiers.tokens_from("host") for tiers in self._below),
            disk_tokens=max(tiers.tokens_from("disk") for tiers in self._below),
            evictions=sum(table.evictions for table in tables),
            host_bytes=sum(tiers.host.nbytes for tiers in self._below),
        )

    def submit(self, request: Request) -> str:
        """Queue a request and return its id. Thread-safe.

        Raises PromptTooLong, or UsageError for unknown token ids, an id in use, or bad sampling settings.
        """
        return self._submit(request, None)

    def cancel(self, request_id: str) -> bool:
        """Ask a request to end with reason "cancelled" before the next step. False if it has ended. Thread-safe."""
        with self._inbox:
            if request_id not in self._live:
                return False
            self._cancelled.add(request_id)
            return True

    def step(self) -> list[Event]:
        """One forward pass over everything that can run, and what came of it. Nothing to do: an empty list."""
        events: list[Event] = []
        with self._own_turn(halt=False):
            try:
                self._take_in(events)
                self._engine.step(events)
            finally:
                self._deliver(events)
        return events

    def stream(self, *requests: Request, cancelled: Callable[[], bool] | None = None) -> Iterator[Event]:
        """Submit requests and yield their events until all have ended. Leaving early cancels those still running.

        Raises what `submit` raises, and the error of a request that failed (the others are cancelled then). Several
        threads may stream at once: whoever waits drives the steps for all. `cancelled` is asked once, before the start.
        """
        return self._stream(requests, [], cancelled)

    def run(self, requests: Iterable[Request]) -> list[Result]:
        """Run requests together; their results in the same order. Raises like `stream`."""
        ids: list[str] = []
        results: dict[str, Result] = {}
        for event in self._stream(requests, ids):
            if isinstance(event, Finished):
                results[event.request_id] = event.result
        return [results[request_id] for request_id in ids]

    def logits(self, tokens: Many[int], *, mix: Mix = ()) -> Tensor:
        """float32 (len(tokens), vocab) on the CPU: what the model expects after every token. Uses no cached prefix.

        Raises PromptTooLong, or CacheFull while running requests leave too few pages.
        """
        parts: list[Tensor] = []
        self.each_logits(tokens, lambda position, rows: parts.append(rows), mix=mix)
        return torch.cat(parts).clone()  # made outside of inference mode: an ordinary tensor

    def each_logits(self, tokens: Many[int], visit: Visit, *, first: int = 0, mix: Mix = ()) -> None:
        """The same in parts, so that a long text needs little memory: see `Runner.each_logits`. Raises as `logits`."""
        if not 0 < len(tokens) <= self.context:
            raise PromptTooLong(
                f"{len(tokens)} tokens were given, the context holds 1 to {self.context}",
                hint="give them in parts, or raise --context",
            )
        self._intake.check_ids(tokens)
        with self._own_turn():
            chunk = self._scheduler.prefill_tokens
            lent = self.pools.lend(len(tokens), chunk)
            try:
                tables = [unrolled(pages, self.kv.geometry.pages_for(len(tokens))) for pages in lent]
                rope_length = self.model.spec.rope_length(len(tokens))
                each = self._runner.each_logits
                each(list(tokens), tables, rope_length, visit, first=first, chunk=chunk, mix=mix)
            finally:
                self.pools.take_back(lent)

    def knows_past(self, past: bytes) -> bool:
        """True when a conversation went on after exactly these turns had left (`Left.past`). Thread-safe."""
        return self._dropper.knows(past)

    def remember(self, tokens: Many[int]) -> None:
        """Let guesses come from this text too, as they do from replies of the past."""
        with self._own_turn():
            self._speculator.memory.add(tokens)

    def forget(self) -> None:
        """Empty the prefix cache of all that no running request uses, and the tiers below it."""
        with self._own_turn():
            self.pools.clear()
            for tiers in self._below:
                tiers.clear()

    @contextmanager
    def holding(self, tokens: Many[int], *, past: bytes = b"", keep: int | None = None) -> Iterator[Contents]:
        """What the cache has of `tokens`; its pages stay as they are until the end of the block. past: of turns that
        left before them, see `Left`; keep: as in a `Request`, where the conversation may have rolled."""
        roll = None if keep is None else roll_for(self.context, keep, self.kv.page_size)
        with self._own_turn():
            held = hold(self._roller, self._dropper, tokens, roots=[*reversed(self._roots)], past=past, roll=roll)
        try:
            yield held.contents
        finally:
            with self._own_turn():
                held.release()

    def attach(self, snapshot: Snapshot) -> None:
        """Let prompts begin with what this snapshot holds. Raises StorageError."""
        with self._own_turn():
            if left := snapshot.more.get("left"):
                self._dropper.learn(snapshot.root, left)
            for tiers, tier in zip(self._below, snapshot.tiers, strict=True):
                tiers.add(tier)
            if not left:
                self._note_root(snapshot.root)

    def detach(self, snapshot: Snapshot) -> None:
        """The opposite; what was read from it stays in the cache. Nothing happens when it is not attached."""
        with self._own_turn():
            for tiers, tier in zip(self._below, snapshot.tiers, strict=True):
                if tier in tiers.others:
                    tiers.remove(tier)

    def _note_root(self, root: bytes) -> None:
        self._roots.pop(root, None)
        self._roots[root] = None
        if len(self._roots) > ROOTS:
            del self._roots[next(iter(self._roots))]

    def _submit(self, request: Request, box: deque[Event] | None) -> str:
        with self._inbox:
            self._count += 1
            order = self._count
        request = replace(request, id=request.id or f"request-{order}")
        sequence = self._intake.prepare(request, order=order, now=self._clock())
        with self._inbox:
            if request.id in self._live:
                raise UsageError(f"a request with the id {request.id!r} is still running", hint="leave the id empty")
            self._live[request.id] = sequence
            self._note_root(sequence.root)
            if box is not None:
                self._boxes[request.id] = box
            self._submitted.append(sequence)
        return request.id

    def _stream(
        self, requests: Iterable[Request], ids: list[str], cancelled: Callable[[], bool] | None = None
    ) -> Iterator[Event]:
        box: deque[Event] = deque()
        try:
            for request in requests:
                ids.append(self._submit(request, box))
            if cancelled is not None and cancelled():  # before there was anything to cancel
                for request_id in ids:
                    self.cancel(request_id)
            unfinished = len(ids)
            while unfinished:
                while box:
                    event = box.popleft()
                    if isinstance(event, Failed):
                        raise event.error
                    unfinished -= isinstance(event, Finished)
                    yield event
                if unfinished:
                    with self._own_turn(halt=False):
                        if not box:  # nobody else's step has brought news meanwhile
                            self.step()
        finally:
            self._abandon(ids)

    @contextmanager
    def _own_turn(self, *, halt: bool = True) -> Iterator[None]:
        try:
            with self._turn:
                outermost, self._occupied = not self._occupied, True
                try:
                    if halt:  # only the next step may find a pass under way
                        self._runner.halt()
                    yield
                finally:
                    self._occupied = not outermost
        finally:
            self._reap()

    def _abandon(self, ids: Many[str]) -> None:
        """The owner has gone: no event may pile up for it, and what still runs is to end."""
        with self._inbox:
            for request_id in ids:
                self._boxes.pop(request_id, None)
            self._orphans.update(request_id for request_id in ids if request_id in self._live)
        self._reap()

    def _reap(self) -> None:
        """End orphans now, or leave them to whoever has the turn: everybody looks again after giving it up."""
        while self._orphans and self._turn.acquire(blocking=False):
            try:
                if self._occupied:
                    return
                self._end_orphans()
            finally:
                self._turn.release()

    def _end_orphans(self) -> None:
        with self._inbox:
            self._admit_submitted()
            asked, self._orphans = self._orphans, set()
            orphans = [self._live[request_id] for request_id in asked if request_id in self._live]
        events: list[Event] = []
        for sequence in orphans:
            self._engine.end(sequence, "cancelled", events)
        self._deliver(events)

    def _deliver(self, events: list[Event]) -> None:
        with self._inbox:
            for event in events:
                if isinstance(event, Finished | Failed):
                    self._live.pop(event.request_id, None)
                if (box := self._boxes.get(event.request_id)) is not None:
                    box.append(event)

    def _take_in(self, events: list[Event]) -> None:
        """What other threads asked for since the last step, and what time has ended."""
        now = self._clock()
        with self._inbox:
            self._admit_submitted()
            # Exchanged, not iterated: a signal handler may call `cancel` on this very thread between two lines.
            asked, self._cancelled = self._cancelled, set()
            cancelled = [self._live[request_id] for request_id in asked if request_id in self._live]
            late = [sequence for sequence in tuple(self._live.values()) if sequence.is_late(now)]
        for sequence in cancelled:
            self._engine.end(sequence, "cancelled", events)
        for sequence in late:
            if sequence not in cancelled:
                self._engine.end(sequence, "deadline", events)

    def _admit_submitted(self) -> None:
        while self._submitted:
            self._scheduler.add(self._submitted.popleft())
