"""Sequences that outgrow their context: which page leaves, and where a later turn finds what is still there.

What token n of a rolling sequence sees depends on n alone (`cache.window.Roll`), so the keys of its pages do too: a
page computed before anything left has the key of any prefix, a later one a key that follows a marked parent. A turn
that brings the whole conversation again chains through all of it, including what has long left, and needs only the
last pages to be there. Only where prompts that were too long to begin with were cut is remembered: nothing else tells.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from hashlib import blake2b

from ..cache.pools import Hit, Pool, Pools
from ..cache.prefix import chain, pack
from ..cache.sinks import SinkKeeper
from ..cache.window import NOTHING, Cut, Roll
from .sequence import Sequence

CUTS = 64  # places where prompts were cut that are remembered


@dataclass(frozen=True, slots=True)
class Found:
    """Where a sequence can go on: `tokens` are all of it but what `cut` left out, the first `reused` are computed.

    keys  of the pages in sight, the sinks among them, when something has left already; else empty
    """

    tokens: list[int]
    cut: Cut
    reused: int
    keys: tuple[bytes, ...] = ()


class Roller:
    """Moves windows. Not thread-safe, as the scheduler around it.

    Where layers have windows of their own, sinks are out of their sight before anything moves (`useful_window`): there
    the list of pages becomes shorter, and that is all.
    """

    def __init__(self, pools: Pools, sinks: SinkKeeper) -> None:
        self.pools = pools
        self.table = pools[0].table
        self.sinks = sinks
        self._cuts: dict[tuple[int, int, bytes], None] = {}  # start, stop, hash of all tokens before stop; oldest first

    def full(self, sequence: Sequence) -> bool:
        """True when something has to leave before the next token is computed."""
        roll = sequence.roll
        return roll is not None and sequence.kv_length == roll.capacity and len(sequence.tokens) > roll.capacity

    def missing(self, sequence: Sequence) -> int:
        """Pages that `move` needs beyond those that are free or become so."""
        roll, table = sequence.roll, self.table
        assert roll is not None
        if sequence.shift or self.pools[0].window is not None:
            return 0
        released = sequence.pages[: roll.sinks + 1]
        return roll.sinks - table.available - sum(table.references(page) == 1 for page in released)

    def move(self, sequence: Sequence) -> None:
        """Let one page leave; the sinks follow. Only while `full`, and nothing is `missing`."""
        roll, table = sequence.roll, self.table
        assert roll is not None
        for pool, held in zip(self.pools, sequence.held, strict=True):
            if pool.window is not None:
                pool.leave(held, sequence.kv_length)
                assert held.gone > roll.sinks, "sinks are in sight of a window"
                del held.pages[roll.sinks]
                held.gone -= 1
        sinks: list[int] = []
        if self.pools[0].window is None:
            sinks, rest = sequence.pages[: roll.sinks], sequence.pages[roll.sinks + 1 :]
            leaving = sequence.pages[roll.sinks]
            if sequence.sinks is None:
                key = sequence.keys[roll.sinks - 1]
                sequence.sinks = self.sinks.find(key) or self.sinks.keep(key, sinks)
            if rest:
                table.detach(rest[0])
            if sequence.shift:
                table.release([leaving])
            else:  # the sinks in their first place may be of use to others
                table.release([*sinks, leaving])
                sinks = [table.take() for _ in sinks]
            sequence.pages = [*sinks, *rest]
        del sequence.keys[roll.sinks]
        sequence.matched = 0
        sequence.kv_length -= roll.page_size
        sequence.draft_length = max(0, sequence.draft_length - roll.page_size)
        sequence.set_gone(sequence.shift + roll.page_size)
        sequence.version += 1
        if sequence.sinks is not None:
            self.sinks.write(sequence.sinks, sinks, shift=sequence.shift, planned=sequence.planned)

    def find(self, sequence: Sequence) -> Found:
        """The best place to go on with a sequence that waits."""
        roll, whole = sequence.roll, sequence.whole
        assert roll is not None
        if whole is None:
            return self._reused(sequence.tokens, NOTHING, sequence, roll)
        best = Found(sequence.tokens, sequence.cut, 0)
        for gone in (NOTHING, *self._known_cuts(whole)):
            if gone.start not in (0, roll.kept):
                continue
            found = self._reused([*whole[: gone.start], *whole[gone.stop :]], gone, sequence, roll)
            # A prompt that is cut is computed from its beginning: that is short, too.
            if len(found.tokens) - found.reused < len(best.tokens) - best.reused:
                best = found
        return best

    def match(self, sequence: Sequence, found: Found, limit: int) -> Hit:
        """Acquire what `find` found of a sequence, at most `limit` tokens: the recent pages where something has left
        (the sinks are not among them), else the beginning."""
        roll = sequence.roll
        assert roll is not None
        if not found.keys:
            return self.pools.match(found.tokens, root=sequence.root, limit=min(limit, roll.capacity - 1))
        rest = found.tokens[found.reused : min(found.reused + roll.page_size, limit)]
        return self.pools.reach(found.keys, self._recent(roll), roll.mark(found.keys[-1]), rest)

    def adopt(self, sequence: Sequence, found: Found, sinks: Many[int]) -> None:
        """The sequence goes on there; `sinks` are pages for them where something has left."""
        roll = sequence.roll
        assert roll is not None
        if sequence.whole is not None:
            sequence.dropped_tokens += found.cut.tokens - sequence.cut.tokens
            sequence.tokens, sequence.cut = list(found.tokens), found.cut
            self._remember(sequence.whole, found.cut)
            sequence.whole = None
        if found.keys:
            sequence.set_gone(found.reused - (roll.pages - 1) * roll.page_size)
            if self.pools[0].window is None:
                sequence.sinks = self.sinks.find(found.keys[roll.sinks - 1])
                assert sequence.sinks is not None
                self.sinks.write(sequence.sinks, sinks, shift=sequence.shift, planned=sequence.planned)
        if not sequence.generated:
            sequence.prompt = tuple(sequence.tokens)

    def _remember(self, whole: tuple[int, ...], cut: Cut) -> None:
        if not cut.tokens:
            return
        place = (cut.start, cut.stop, _digest(pack(whole), cut.stop))
        self._cuts.pop(place, None)
        self._cuts[place] = None
        if len(self._cuts) > CUTS:
            del self._cuts[next(iter(self._cuts))]

    def _known_cuts(self, whole: tuple[int, ...]) -> list[Cut]:
        packed = pack(whole)
        digests: dict[int, bytes] = {}
        cuts = []
        for start, stop, digest in self._cuts:
            if stop >= len(whole):
                continue
            if stop not in digests:
                digests[stop] = _digest(packed, stop)
            if digests[stop] == digest:
                cuts.append(Cut(start, stop))
        return cuts

    def _reused(self, tokens: list[int], gone: Cut, sequence: Sequence, roll: Roll) -> Found:
        size, counts = roll.page_size, self._recent(roll)
        key, keys = sequence.root, []
        for page in range((len(tokens) - 1) // size):
            key = chain(roll.mark(key) if roll.gone(page) else key, pack(tokens[page * size : (page + 1) * size]))
            keys.append(key)

        def has(pool: Pool, page: int) -> bool:
            return pool.table.has(keys[page])

        windowed = self.pools[0].window is not None
        if len(keys) >= roll.pages and (windowed or self.sinks.find(keys[roll.sinks - 1]) is not None):
            for count in range(len(keys), roll.pages - 1, -1):
                last = ((pool, range(count - 1, count - 1 - n, -1)) for pool, n in zip(self.pools, counts, strict=True))
                if all(has(pool, page) for pool, pages in last for page in pages):
                    recent = keys[count + 1 - roll.pages + roll.sinks : count]
                    return Found(tokens, gone, count * size, (*keys[: roll.sinks], *recent))
        plain = self.pools.longest(min(len(keys), roll.pages), has)
        return Found(tokens, gone, plain * size)

    def _recent(self, roll: Roll) -> list[int]:
        """In every pool, how many full pages behind the sinks are in sight where something has left."""
        full = roll.pages - 1
        return [full - max(roll.sinks, pool.first(full * roll.page_size)) for pool in self.pools]


def _digest(packed: bytes, tokens: int) -> bytes:
    return blake2b(packed[: tokens * len(pack([0]))], digest_size=16).digest()
