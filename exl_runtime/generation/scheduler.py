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
from ..errors import CacheFull
from .dropping import Dropper
from .request import RequestState
from .rolling import Found, Roller
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
        table: PageTable,
        *,
        prefill_tokens: int = PREFILL_TOKENS,
        max_running: int = MAX_RUNNING,
        roller: Roller | None = None,
        dropper: Dropper | None = None,
    ) -> None:
        """`roller` moves the windows of sequences that have a `roll`; without one there must be none. `dropper` finds
        what is left of sequences that lost turns; without one they are computed again."""
        self.table = table
        self.roller = roller
        self.dropper = dropper
        self.prefill_tokens = prefill_tokens
        self.max_running = max_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._refused: tuple[Sequence, int, int] | None = None  # who did not fit, and what has to change before it may

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let a QUEUED sequence wait for its turn."""
        insort(self.waiting, sequence, key=lambda other: other.rank)

    def remove(self, sequence: Sequence, state: RequestState, *, forget: bool = False) -> None:
        """Take a sequence out in its final `state`; its pages stay in the prefix cache unless `forget`."""
        if sequence.state is RequestState.QUEUED:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self._give_back(sequence, forget=forget)
        sequence.move(state)

    def requeue(self, sequence: Sequence) -> None:
        """Take the pages of a running sequence; it waits, and is computed again from its tokens."""
        self.running.remove(sequence)
        self._give_back(sequence)
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
            if sequence.state is RequestState.DECODE and self._make_room(sequence, preempted):
                decode.append(sequence)
        admitted: list[Sequence] = []
        stuck: list[Sequence] = []
        for sequence in decode:
            self._grant(sequence)
        left = max(self.prefill_tokens - len(decode) - sum(sequence.room for sequence in decode), 1)
        shares: dict[Sequence, int] = {}
        for sequence in self._prompts(admitted, stuck):
            rest = min(len(sequence.tokens), sequence.capacity) - sequence.kv_length
            shares[sequence] = rest if rest <= left else max(1, left // 2)
            left -= shares[sequence]
            if left == 0:
                break
        prefill = []
        for sequence, share in shares.items():
            start = sequence.kv_length
            most = min(len(sequence.tokens), sequence.capacity)
            stop = min(start + share + left, most)  # what others did not need goes to the first
            left -= stop - start - share
            prefill.append(Chunk(sequence, start, stop))
        return Step(tuple(prefill), tuple(decode), tuple(admitted), tuple(preempted), tuple(stuck))

    def settle(self, sequence: Sequence) -> None:
        """The copy this sequence waited for is done."""
        if sequence.copy is not None:
            self.table.release([sequence.copy.source])
            sequence.copy = None

    def commit(self, chunk: Chunk) -> None:
        """The keys and values of a chunk are computed: seal what is full, make the rest of a prompt findable too."""
        sequence = chunk.sequence
        sequence.reach(chunk.stop)
        self._seal(sequence)
        if sequence.state is RequestState.PREFILL:
            self._record_tail(sequence)

    def _seal(self, sequence: Sequence) -> None:
        """Make pages that are full findable."""
        size = self.table.page_size
        while (index := len(sequence.keys)) < sequence.kv_length // size:
            tokens = sequence.tokens[index * size : (index + 1) * size]
            page, key = self.table.seal(sequence.pages[index], sequence.parent, tokens)
            if page != sequence.pages[index]:
                sequence.pages[index] = page
                sequence.version += 1
            sequence.keys.append(key)

    def trim(self, sequence: Sequence) -> None:
        """Give back the pages that were taken for guesses and hold nothing: as if there had been none."""
        while len(sequence.pages) > -(-sequence.kv_length // self.table.page_size):
            self.table.release([sequence.pages.pop()])
            sequence.version += 1

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
        if sequence.kv_length < len(sequence.pages) * self.table.page_size:
            return True
        while True:
            try:
                page = self.table.take()
            except CacheFull:
                if not self._yield_one(sequence, preempted):
                    return False
                continue
            sequence.pages.append(page)
            sequence.version += 1
            return True

    def _grant(self, sequence: Sequence) -> None:
        """Room for as many guesses as wished, in pages that nobody else is going to miss."""
        size = self.table.page_size
        if sequence.roll is not None:
            sequence.wish = min(sequence.wish, sequence.capacity - sequence.kv_length - 1)
        while sequence.kv_length + 1 + sequence.wish > len(sequence.pages) * size:
            if self.table.available <= len(self.running):
                break
            sequence.pages.append(self.table.take())
            sequence.version += 1
        sequence.room = min(sequence.wish, len(sequence.pages) * size - sequence.kv_length - 1)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its cached prefix, and pages for all its tokens. False if there are too few."""
        table = self.table
        if self._refused == (sequence, table.version, len(self.running)):
            return False
        # At least the last token is computed again: its logits are wanted.
        limit = min(len(sequence.tokens) - 1, sequence.reusable)
        needed = -(-len(sequence.tokens) // table.page_size)
        roller, roll, found, start = self.roller, sequence.roll, None, None
        if roller is not None and roll is not None:
            found = roller.find(sequence)
            match = roller.match(sequence, found, len(found.tokens) - 1)
            needed = min(-(-len(found.tokens) // table.page_size), roll.pages)
        elif self.dropper is not None and sequence.left_turns is not None:
            start = self.dropper.find(sequence, limit)
            match = start.match
        else:
            match = table.match(sequence.tokens, root=sequence.root, limit=limit)
        # Replies in progress will want pages soon; a newcomer that takes the last ones would only have to yield.
        headroom = min(len(self.running), table.pages // 8)
        in_place = int(match.source is not None and table.references(match.source) == 1)
        held = [] if start is None else start.held
        in_place += sum(table.references(page) == 1 for page in held)
        # A second branch has its pages from the start: it must never have to yield in the middle of a step.
        beside = 0 if sequence.shadow is None else -(-sequence.shadow.most // table.page_size)
        if needed + beside - len(match.pages) > table.available + in_place - headroom:
            table.release([*match.pages, *held, *([] if match.source is None else [match.source])])
            self._refused = (sequence, table.version, len(self.running))
            return False
        self._refused = None
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda other: other.rank)
        sequence.move(RequestState.PREFILL)
        sequence.matched = len(match.pages)
        sequence.keys = match.keys
        sequence.follows = None
        table.release(held)  # they may be taken now: what they hold is read before anything is written
        if sequence.shadow is not None:
            sequence.shadow.pages = [table.take() for _ in range(beside)]
        fresh = [table.take() for _ in range(needed - len(match.pages) - (match.source is not None))]
        if match.source is not None:
            # After the others: when they took the last pages, the matched page itself goes on.
            page, sequence.copy = table.fork(match)
            fresh.insert(0, page)
        sequence.pages = match.pages + fresh
        if roller is not None and found is not None:
            self._resume(roller, sequence, found)
        sequence.kv_length = len(sequence.keys) * table.page_size + match.shared
        sequence.draft_length = sequence.kv_length
        sequence.version += 1
        reused = sequence.kv_length
        if self.dropper is not None and start is not None:
            reused += self.dropper.adopt(sequence, start)
            self._seal(sequence)
            self._record_tail(sequence)
        if sequence.reused_tokens is None:
            sequence.reused_tokens = reused
        return True

    def _resume(self, roller: Roller, sequence: Sequence, found: Found) -> None:
        """Go on with a window, which begins with pages that are still to be written where something has left it."""
        sinks: list[int] = []
        if found.keys:
            assert sequence.roll is not None
            count = sequence.roll.sinks
            sinks, rest = sequence.pages[-count:], sequence.pages[:-count]
            sequence.pages, sequence.keys, sequence.matched = [*sinks, *rest], list(found.keys), 0
        roller.adopt(sequence, found, sinks)

    def _should_follow(self, sequence: Sequence) -> bool:
        """True while a running prompt is still to compute a beginning that this sequence could reuse afterwards."""
        if sequence.scores_prompt:
            return False
        if sequence.follows is None:
            worthwhile = max(1, self.table.page_size // 8)
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

    def _give_back(self, sequence: Sequence, *, forget: bool = False) -> None:
        if sequence.copy is not None:
            # The copy never happened: what was to be copied is not in the page.
            sequence.kv_length = min(sequence.kv_length, len(sequence.keys) * self.table.page_size)
            self.settle(sequence)
        if not forget:
            self._record_tail(sequence)
        self.table.release(sequence.pages[sequence.matched :], forget=forget)
        self.table.release(sequence.pages[: sequence.matched])
        sequence.matched = 0
        sequence.pages = []
        sequence.keys = []
        sequence.kv_length = 0
        sequence.draft, sequence.wish, sequence.room = [], 0, 0
        sequence.sinks = None
        if sequence.roll is None:
            sequence.root, sequence.shift, sequence.placed = sequence.base, 0, None
        elif sequence.shift:
            sequence.set_gone(0)
        if sequence.shadow is not None:
            sequence.shadow.release(self.table)
        sequence.version += 1

    def _record_tail(self, sequence: Sequence) -> None:
        start = len(sequence.keys) * self.table.page_size
        if start < sequence.kv_length:
            tail = sequence.tokens[start : sequence.kv_length]
            self.table.record(sequence.pages[len(sequence.keys)], sequence.parent, tail)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
