"""Sequences that outgrow their context: which page leaves, and where a later turn finds what is still there.

What token n of a rolling sequence sees depends on n alone (`cache.window.Roll`), so the keys of its pages do too: a
page computed before anything left has the key of any prefix, a later one a key that follows a marked parent. A turn
that brings the whole conversation again chains through all of it, including what has long left, and needs only the
last pages to be there. Only where prompts that were too long to begin with were cut is remembered: nothing else tells.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from hashlib import blake2b

from ..cache.pages import Place
from ..cache.pools import Hit, Pool, Pools
from ..cache.prefix import chain, pack
from ..cache.sinks import SinkKeeper, Sinks
from ..cache.window import NOTHING, Cut, Roll
from .sequence import Sequence

CUTS = 64  # places where prompts were cut that are remembered


@dataclass(frozen=True, slots=True)
class Found:
    """Where a sequence can go on: `tokens` are all of it but what `cut` left out, the first `reused` are computed.

    places  of the full pages in sight, the sinks among them, when something has left already; else empty
    """

    tokens: list[int]
    cut: Cut
    reused: int
    places: tuple[Place, ...] = ()

    @property
    def keys(self) -> list[bytes]:
        """Of those pages."""
        return [place[2] for place in self.places]


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

    def start(self, sequence: Sequence) -> tuple[Found, Hit]:
        """The best place to go on with a sequence that waits, acquired: the recent pages where something has left (the
        sinks are not among them), else the beginning. At least the last token is left to be computed."""
        sequence.sinks = None
        found = self.find(sequence)
        roll = sequence.roll
        assert roll is not None
        opened = self.open(found, roll, len(found.tokens) - 1) if found.places else None
        if opened is not None:
            hit, sequence.sinks = opened
        else:
            if found.places:  # something did not come back from below
                found = Found(sequence.tokens, sequence.cut if sequence.whole else NOTHING, 0)
            limit = min(len(found.tokens), roll.capacity) - 1
            hit = self.pools.match(found.tokens, root=sequence.root, limit=limit)
        return found, hit

    def find(self, sequence: Sequence) -> Found:
        """The best place to go on with a sequence that waits."""
        roll, whole = sequence.roll, sequence.whole
        assert roll is not None
        if whole is None:
            return self.reused(sequence.tokens[:-1], sequence.root, roll, whole=sequence.tokens)
        best = Found(sequence.tokens, sequence.cut, 0)
        for gone in (NOTHING, *self._known_cuts(whole)):
            if gone.start not in (0, roll.kept):
                continue
            tokens = [*whole[: gone.start], *whole[gone.stop :]]
            found = self.reused(tokens[:-1], sequence.root, roll, whole=tokens, gone=gone)
            # A prompt that is cut is computed from its beginning: that is short, too.
            if len(found.tokens) - found.reused < len(best.tokens) - best.reused:
                best = found
        return best

    def open(self, found: Found, roll: Roll, limit: int) -> tuple[Hit, Sinks | None] | None:
        """The recent pages that were found, and at most `limit` tokens, acquired; and the sinks, where something has to
        be turned. None: not all of it comes back."""
        sinks = None
        if self.pools[0].window is None:
            sinks = self._kept(found.places[: roll.sinks])
            if sinks is None:
                return None
        rest = found.tokens[found.reused : min(found.reused + roll.page_size, limit)]
        hit = self.pools.reach(found.places, self._recent(roll), roll.mark(found.keys[-1]), rest)
        return None if hit is None else (hit, sinks)

    def _kept(self, places: Many[Place]) -> Sinks | None:
        """The sinks in these pages as first computed: what was kept of them, or what they still hold."""
        key = places[-1][2]
        sinks = self.sinks.find(key)
        if sinks is not None:
            return sinks
        pages = []
        for place in places:
            page = self.table.claim(*place)
            if page is not None:
                pages.append(page)
        if len(pages) == len(places):
            sinks = self.sinks.keep(key, pages)
        self.table.release(pages)
        return sinks

    def adopt(self, sequence: Sequence, found: Found, sinks: Many[int]) -> None:
        """The sequence goes on there; `sinks` are pages for them where something has left."""
        roll = sequence.roll
        assert roll is not None
        if sequence.whole is not None:
            sequence.dropped_tokens += found.cut.tokens - sequence.cut.tokens
            sequence.tokens, sequence.cut = list(found.tokens), found.cut
            self._remember(sequence.whole, found.cut)
            sequence.whole = None
        if found.places:
            sequence.set_gone(found.reused - (roll.pages - 1) * roll.page_size)
            if self.pools[0].window is None:
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

    def reused(
        self, tokens: list[int], root: bytes, roll: Roll, *, whole: list[int] | None = None, gone: Cut = NOTHING
    ) -> Found:
        """What there is of `tokens`, the beginning of `whole`, from which `gone` was cut."""
        counts, places = self._recent(roll), places_of(tokens, root, roll)
        whole = tokens if whole is None else whole

        def knows(pool: Pool, page: int) -> bool:
            return pool.table.knows(*places[page])

        if len(places) >= roll.pages and (self.pools[0].window is not None or self._has_sinks(places[: roll.sinks])):
            for count in range(len(places), roll.pages - 1, -1):
                last = ((pool, range(count - 1, count - 1 - n, -1)) for pool, n in zip(self.pools, counts, strict=True))
                if all(knows(pool, page) for pool, pages in last for page in pages):
                    recent = places[count + 1 - roll.pages + roll.sinks : count]
                    return Found(whole, gone, count * roll.page_size, (*places[: roll.sinks], *recent))
        plain = self.pools.longest(min(len(places), roll.pages), knows)
        return Found(whole, gone, plain * roll.page_size)

    def _has_sinks(self, places: Many[Place]) -> bool:
        return self.sinks.find(places[-1][2]) is not None or all(self.table.knows(*place) for place in places)

    def _recent(self, roll: Roll) -> list[int]:
        """In every pool, how many full pages behind the sinks are in sight where something has left."""
        full = roll.pages - 1
        return [full - max(roll.sinks, pool.first(full * roll.page_size)) for pool in self.pools]


def places_of(tokens: Many[int], root: bytes, roll: Roll) -> list[Place]:
    """Of all full pages of a sequence, whatever has left."""
    size, key, places = roll.page_size, root, []
    packed = pack(tokens)
    width = len(packed) // max(1, len(tokens)) * size
    for page in range(len(tokens) // size):
        parent = roll.mark(key) if roll.gone(page) else key
        part = packed[page * width : (page + 1) * width]
        key = chain(parent, part)
        places.append((parent, part, key))
    return places


def _digest(packed: bytes, tokens: int) -> bytes:
    return blake2b(packed[: tokens * len(pack([0]))], digest_size=16).digest()
