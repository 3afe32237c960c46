"""Who runs next, and in which pages. Decides, does not run: integers and states, no tensors, no text.

Running requests that decode go first, one token each. What is left of the token budget goes to prompts, in order
of rank, in chunks: a long prompt never holds up a reply for longer than one step, and leaves half of what there is
to the prompts behind it. A request is let in when pages for its whole prompt are there. When a reply needs a page
and there is none, the running request of the lowest rank yields all its pages and waits to be computed again; the
highest rank never yields, so something always ends.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from ..cache.pages import PageTable
from ..cache.pools import Pools
from ..errors import CacheFull
from .dropping import Dropper
from .paging import Pager
from .request import RequestState
from .rolling import Roller
from .sequence import Sequence

PREFILL_TOKENS = 512  # tokens of one forward pass
MAX_RUNNING = 64


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens [start, stop) of a sequence, and the guesses `draft` behind them. A token can be drawn behind it
    when stop is the end of the sequence's tokens."""

    sequence: Sequence
    start: int
    stop: int
    draft: tuple[int, ...] = ()

    @property
    def wants_logits(self) -> bool:
        return self.stop == len(self.sequence.tokens)

    @property
    def end(self) -> int:
        """Where the guesses end."""
        return self.stop + len(self.draft)

    @property
    def ids(self) -> list[int]:
        """All token ids to compute."""
        return [*self.sequence.tokens[self.start : self.stop], *self.draft]

    @property
    def rows(self) -> int:
        """How many of the last places' logits are wanted."""
        if self.sequence.scores_prompt and self.start < len(self.sequence.prompt) - 1:
            return self.end - self.start
        return len(self.draft) + self.wants_logits


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass. Sequences in `stuck` cannot go on even with the whole cache to themselves."""

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[Sequence, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    stuck: tuple[Sequence, ...] = ()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Everything to compute, decodes first."""
        decode = tuple(Chunk(s, s.kv_length, s.kv_length + 1, tuple(s.draft)) for s in self.decode)
        return decode + self.prefill


class Scheduler:
    """Holds the queue and the running requests, both in order of rank. Not thread-safe."""

    def __init__(
        self,
        pools: Pools | PageTable,
        *,
        prefill_tokens: int = PREFILL_TOKENS,
        max_running: int = MAX_RUNNING,
        roller: Roller | None = None,
        dropper: Dropper | None = None,
    ) -> None:
        """`pools`: a page table stands for the only one. `roller` moves the windows of sequences that have a `roll`;
        without one there must be none. `dropper` finds what is left of sequences that lost turns; without one they are
        computed again."""
        self.pools = pools if isinstance(pools, Pools) else Pools.of(pools)
        self.roller = roller
        self._pager = Pager(self.pools, roller, dropper, new=PREFILL_TOKENS)
        self.prefill_tokens = prefill_tokens
        self.max_running = max_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._refused: tuple[Sequence, int, int] | None = None  # who did not fit, and what has to change before it may

    @property
    def table(self) -> PageTable:
        """The page table of the first pool."""
        return self.pools[0].table

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def closed(self) -> bool:
        """True while nobody waits who could be let in, as far as that is known without looking."""
        if not self.waiting or len(self.running) >= self.max_running:
            return True
        return self._refused == (self.waiting[0], self.pools.version, len(self.running))

    def add(self, sequence: Sequence) -> None:
        """Let a QUEUED sequence wait for its turn."""
        insort(self.waiting, sequence, key=lambda other: other.rank)

    def remove(self, sequence: Sequence, state: RequestState, *, forget: bool = False) -> None:
        """Take a sequence out in its final `state`; its pages stay in the prefix cache unless `forget`."""
        if sequence.state is RequestState.QUEUED:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self._pager.give_back(sequence, forget=forget)
        sequence.move(state)

    def requeue(self, sequence: Sequence) -> None:
        """Take the pages of a running sequence; it waits, and is computed again from its tokens."""
        self.running.remove(sequence)
        self._pager.give_back(sequence)
        sequence.move(RequestState.QUEUED)
        self.add(sequence)

    def schedule(self) -> Step:
        """The next forward pass. Pages for it are taken; `settle` and `commit` follow when it has run."""
        decode: list[Sequence] = []
        preempted: list[Sequence] = []
        for sequence in tuple(self.running):
            # A sequence that had to yield to one before it is queued again.
            if sequence.state is RequestState.QUEUED or not self._roll(sequence, preempted):
                continue
            if not self._make_room(sequence, preempted):
                continue
            if sequence.state is RequestState.DECODE:
                decode.append(sequence)
            else:
                self._pager.prepare(sequence, len(self.running))
        admitted: list[Sequence] = []
        stuck: list[Sequence] = []
        for sequence in decode:
            self._pager.grant(sequence, len(self.running))
        left = max(self.prefill_tokens - len(decode) - sum(sequence.room for sequence in decode), 1)
        shares: dict[Sequence, int] = {}
        for sequence in self._prompts(admitted, stuck):
            rest = self._reach(sequence) - sequence.kv_length
            shares[sequence] = rest if rest <= left else max(1, left // 2)
            left -= shares[sequence]
            if left == 0:
                break
        prefill = []
        for sequence, share in shares.items():
            start = sequence.kv_length
            stop = min(start + share + left, self._reach(sequence))  # what others did not need goes to the first
            left -= stop - start - share
            prefill.append(Chunk(sequence, start, stop))
        return Step(tuple(prefill), tuple(decode), tuple(admitted), tuple(preempted), tuple(stuck))

    def settle(self, sequence: Sequence) -> None:
        """The copies this sequence waited for are done."""
        self._pager.settle(sequence)

    def commit(self, chunk: Chunk) -> None:
        """The keys and values of a chunk are computed: seal what is full, make the rest of a prompt findable too."""
        sequence = chunk.sequence
        self._pager.commit(sequence, chunk.stop, findable=sequence.state is RequestState.PREFILL)

    def trim(self, sequence: Sequence) -> None:
        """Give back the pages that were taken for guesses and hold nothing: as if there had been none."""
        self._pager.trim(sequence)

    def _reach(self, sequence: Sequence) -> int:
        """How many tokens of a prompt can be in the cache after this step, whatever the budget."""
        return min(len(sequence.tokens), sequence.capacity, self._pager.slots(sequence))

    def _prompts(self, admitted: list[Sequence], stuck: list[Sequence]) -> Iterator[Sequence]:
        """Prompts to work on, by rank: those that run, and between them those that can be let in."""
        running = [sequence for sequence in self.running if sequence.state is RequestState.PREFILL]
        closed = False  # nobody overtakes a request that has to wait
        while True:
            head = self.waiting[0] if self.waiting and not closed and len(self.running) < self.max_running else None
            if head is not None and not (running and running[0].rank < head.rank):
                if self._should_follow(head):
                    closed = True
                elif self._admit(head):
                    admitted.append(head)
                    yield head
                else:
                    closed = True
                    if not self.running:
                        stuck.append(head)
            elif running:
                yield running.pop(0)
            else:
                return

    def _roll(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Let the oldest page of a full window leave. False if the sequence had to yield."""
        roller = self.roller
        if roller is None or not roller.full(sequence):
            return True
        while roller.missing(sequence) > 0:
            if not self._yield_one(sequence, preempted):
                return False
        roller.move(sequence)
        return self._make_room(sequence, preempted)

    def _yield_one(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """The lowest rank gives its pages. False if that is `sequence` itself."""
        victim = self.running[-1]
        self.requeue(victim)
        preempted.append(victim)
        return victim is not sequence

    def _make_room(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """A slot for the token that a sequence computes next. False if it had to yield."""
        while True:
            try:
                self._pager.next_slot(sequence)
            except CacheFull:
                if not self._yield_one(sequence, preempted):
                    return False
                continue
            return True

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run. False if there are too few pages."""
        if self._refused == (sequence, self.pools.version, len(self.running)):
            return False
        if not self._pager.admit(sequence, len(self.running)):
            self._refused = (sequence, self.pools.version, len(self.running))
            return False
        self._refused = None
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda other: other.rank)
        sequence.move(RequestState.PREFILL)
        return True

    def _should_follow(self, sequence: Sequence) -> bool:
        """True while a running prompt is still to compute a beginning that this sequence could reuse afterwards."""
        if sequence.scores_prompt:
            return False
        if sequence.follows is None:
            worthwhile = max(1, self.pools.page_size // 8)
            for other in self.running:
                if other.state is not RequestState.PREFILL or other.root != sequence.root:
                    continue
                if len(other.tokens) > other.capacity:  # its beginning leaves
                    continue
                common = _common(sequence.tokens, other.tokens)
                if common >= other.kv_length + worthwhile:
                    sequence.follows = (other, common)
                    break
            else:
                return False
        leader, common = sequence.follows
        return leader.state is RequestState.PREFILL and leader.kv_length < common


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
