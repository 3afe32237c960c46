"""Which pages a sequence holds: taken, shared, given back. Decides nothing about who runs; `scheduler.py` does.

Where layers have windows, a sequence of any length holds what they see and what a pass adds: pages behind the window
leave whenever a new one is wanted.
"""

from ..cache.pools import Held, Hit, Pools
from .dropping import Dropper
from .rolling import Found, Roller
from .sequence import Sequence


class Pager:
    """Not thread-safe, as the scheduler around it, which says what `roller` and `dropper` are. `new`: tokens of a pass
    of guidance."""

    def __init__(self, pools: Pools, roller: Roller | None, dropper: Dropper | None, *, new: int) -> None:
        self.pools = pools
        self.dropper = dropper
        self._new = new
        self.roller = roller

    def admit(self, sequence: Sequence, running: int) -> bool:
        """Give a waiting sequence its cached prefix, and pages for all its tokens, or for as many of them as one may
        hold at a time. False if there are too few; `running`: how many others want some soon."""
        pools, size = self.pools, self.pools.page_size
        count, found, start = -(-len(sequence.tokens) // size), None, None
        # At least the last token is computed again: its logits are wanted.
        limit = min(len(sequence.tokens) - 1, sequence.reusable)
        if self.roller is not None and sequence.roll is not None:
            found, hit = self.roller.start(sequence)
            count = min(-(-len(found.tokens) // size), sequence.roll.pages)
        elif self.dropper is not None and sequence.left_turns is not None:
            start = self.dropper.find(sequence, limit)
            hit = start.hit
        else:
            hit = pools.match(sequence.tokens, root=sequence.root, limit=limit)
        # A second branch has its pages from the start: it must never have to yield in the middle of a step.
        shadow = sequence.shadow
        beside = [0] * len(pools) if shadow is None else pools.lending(shadow.most, self._new)
        held = [] if start is None else start.held
        wanted = self._wanted(hit, count, beside, running, held)
        pools.let_go(held)  # they may be taken now: what they hold is read before anything is written
        if wanted is None:
            pools.give_up(hit)
            return False
        if shadow is not None:
            shadow.open(pools, self._new)
        part = int(hit.matches[0].source is not None)
        fresh = [[pool.table.take() for _ in range(n - part)] for pool, n in zip(pools, wanted, strict=True)]
        if part:
            # After the others: when they took the last pages, the matched page itself goes on.
            pages, sequence.copies = pools.fork(hit)
            fresh = [[page, *others] for page, others in zip(pages, fresh, strict=True)]
        sequence.held = [Held(m.pages + more, m.gone) for m, more in zip(hit.matches, fresh, strict=True)]
        sequence.matched, sequence.keys, sequence.follows = len(hit.keys), hit.keys, None
        if self.roller is not None and found is not None:
            self._resume(self.roller, sequence, found)
        sequence.kv_length = len(sequence.keys) * size + hit.shared
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

    def settle(self, sequence: Sequence) -> None:
        """The copies this sequence waited for are done."""
        for copy in sequence.copies:
            self.pools[copy.pool].table.release([copy.source])
        sequence.copies = ()

    def slots(self, sequence: Sequence) -> int:
        """Tokens of the sequence for which there are pages everywhere."""
        return min(len(held.pages) for held in sequence.held) * self.pools.page_size

    def next_slot(self, sequence: Sequence) -> None:
        """A slot for the token that the sequence computes next. Raises CacheFull."""
        if sequence.kv_length < self.slots(sequence):
            return
        for pool, held in zip(self.pools, sequence.held, strict=True):
            if sequence.kv_length == len(held.pages) * self.pools.page_size:
                pool.leave(held, sequence.kv_length)
                held.pages.append(pool.table.take())
        self._changed(sequence)

    def prepare(self, sequence: Sequence, running: int) -> None:
        """More pages for the rest of a prompt, of those that nobody else is going to miss."""
        count = -(-min(len(sequence.tokens), sequence.capacity) // self.pools.page_size)
        for pool, held in zip(self.pools, sequence.held, strict=True):
            if len(held.pages) >= count:
                continue
            pool.leave(held, sequence.kv_length)
            spare = pool.table.available - min(running, pool.table.pages // 8)
            wanted = pool.entries(held.gone, count) - len(held.pages)
            held.pages += [pool.table.take() for _ in range(min(wanted, spare))]
            self._changed(sequence)

    def grant(self, sequence: Sequence, running: int) -> None:
        """Room for as many guesses as wished, in pages that nobody else is going to miss."""
        if sequence.roll is not None:
            sequence.wish = min(sequence.wish, sequence.capacity - sequence.kv_length - 1)
        while sequence.kv_length + 1 + sequence.wish > (slots := self.slots(sequence)):
            if any(pool.table.available <= running for pool in self.pools):
                break
            for pool, held in zip(self.pools, sequence.held, strict=True):
                if len(held.pages) * self.pools.page_size == slots:
                    held.pages.append(pool.table.take())
            sequence.version += 1
        sequence.room = min(sequence.wish, slots - sequence.kv_length - 1)

    def commit(self, sequence: Sequence, stop: int, *, findable: bool) -> None:
        """Keys and values up to `stop` are computed: seal what is full; the rest can be found too if `findable`."""
        sequence.reach(stop)
        self._seal(sequence)
        if findable:
            self._record_tail(sequence)

    def trim(self, sequence: Sequence) -> None:
        """Give back the pages that were taken for guesses and hold nothing: as if there had been none."""
        count = -(-sequence.kv_length // self.pools.page_size)
        for pool, held in zip(self.pools, sequence.held, strict=True):
            while len(held.pages) > count:
                pool.table.release([held.pages.pop()])
                sequence.version += 1

    def give_back(self, sequence: Sequence, *, forget: bool = False) -> None:
        """All pages; they stay in the prefix cache unless `forget`."""
        if sequence.copies:
            # The copies never happened: what was to be copied is not in the pages.
            sequence.kv_length = min(sequence.kv_length, len(sequence.keys) * self.pools.page_size)
            self.settle(sequence)
        if not forget:
            self._record_tail(sequence)
        if any(held.pages for held in sequence.held):
            self.pools.release(sequence.held, sequence.keys, matched=sequence.matched, forget=forget)
        sequence.matched = 0
        sequence.held = [Held() for _ in self.pools]
        sequence.keys = []
        sequence.kv_length = 0
        sequence.draft, sequence.wish, sequence.room = [], 0, 0
        sequence.sinks = None
        if sequence.roll is None:
            sequence.root, sequence.shift, sequence.placed = sequence.base, 0, None
        elif sequence.shift:
            sequence.set_gone(0)
        if sequence.shadow is not None:
            sequence.shadow.release()
        sequence.version += 1

    def _wanted(self, hit: Hit, count: int, beside: list[int], running: int, held: list[Held]) -> list[int] | None:
        """Pages that a sequence of `count` pages takes in every pool; None: there are too few of them. `held`: pages
        that are about to be released."""
        wanted = []
        leaving = held or [Held() for _ in self.pools]
        for pool, match, lent, other in zip(self.pools, hit.matches, beside, leaving, strict=True):
            table = pool.table
            pages = pool.entries(match.gone, count) - len(match.pages)
            # Replies in progress will want pages soon; a newcomer that takes the last ones would only have to yield.
            headroom = min(running, table.pages // 8)
            in_place = int(match.source is not None and table.references(match.source) == 1)
            in_place += sum(table.references(page) == 1 for page in other.pages[other.gone :])
            if pages + lent > table.available + in_place - headroom:
                return None
            wanted.append(pages)
        return wanted

    def _resume(self, roller: Roller, sequence: Sequence, found: Found) -> None:
        """Go on with a window, which begins with pages that are still to be written where something has left it."""
        sinks: list[int] = []
        if found.places:
            assert sequence.roll is not None
            sequence.keys, sequence.matched = list(found.keys), 0
            if self.pools[0].window is None:
                count = sequence.roll.sinks
                sinks, rest = sequence.pages[-count:], sequence.pages[:-count]
                sequence.pages = [*sinks, *rest]
        roller.adopt(sequence, found, sinks)

    def _changed(self, sequence: Sequence) -> None:
        sequence.version += 1
        # What has left is no place to write to: a draft model that is further behind goes on from what is there.
        behind = max(held.gone for held in sequence.held) * self.pools.page_size
        sequence.draft_length = max(sequence.draft_length, behind)

    def _seal(self, sequence: Sequence) -> None:
        """Make pages that are full findable."""
        size = self.pools.page_size
        while (page := len(sequence.keys)) < sequence.kv_length // size:
            tokens = sequence.tokens[page * size : (page + 1) * size]
            changed, key = self.pools.seal(sequence.held, page, sequence.parent, tokens)
            sequence.version += changed
            sequence.keys.append(key)

    def _record_tail(self, sequence: Sequence) -> None:
        start = len(sequence.keys) * self.pools.page_size
        if start < sequence.kv_length:
            tail = sequence.tokens[start : sequence.kv_length]
            self.pools.record(sequence.held, len(sequence.keys), sequence.parent, tail)
