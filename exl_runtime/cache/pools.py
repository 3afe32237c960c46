"""Page tables of layers with different windows, as one. A pool is a page table and how far back its layers see.

A sequence has a list of pages in every pool. Entry i is for its tokens i * page_size and up, everywhere: so lengths,
keys and cuts are the same in all pools. What has fallen behind the window of the next token leaves the list of a pool
with a window; the page stays in that pool's prefix cache until somebody needs it. A prefix is found again as far as
every pool still has what comes into sight behind it: all pages without a window, the last ones with one.

Knows no tensors and no requests.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import CacheFull, UsageError
from .geometry import CacheGeometry, first_seen, pages_seen, useful_window
from .pages import Match, PageCopy, PageTable, Place
from .prefix import chain, pack, root_key

if TYPE_CHECKING:
    from .tiers import Tiers

ENDLESS = 1 << 40  # tokens


def capacity(geometry: CacheGeometry, counts: Sequence[int]) -> int:
    """The longest sequence that so many pages of every group hold; behind windows they hold any length."""
    longest = ENDLESS
    for group, count in zip(geometry.groups, counts, strict=True):
        if group.window is None or count <= pages_seen(group.window, 1, geometry.page_size, count):
            longest = min(longest, count * geometry.page_size)
    return longest


@dataclass(slots=True)
class Held:
    """The pages of one sequence in one pool; the first `gone` entries have left, and are 0."""

    pages: list[int] = field(default_factory=list)
    gone: int = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """window: tokens, None: all. most: pages that one sequence takes at a time where there is a window."""

    table: PageTable
    window: int | None = None
    most: int = 0

    def first(self, length: int) -> int:
        """The first page in sight of the token behind `length` ones, and of all later ones."""
        return first_seen(self.window, length, self.table.page_size)

    def sees(self, length: int, start: int) -> bool:
        """Whether, with a window, the token behind `length` ones sees any before `start`."""
        return self.window is not None and max(0, length - self.window + 1) < start

    def entries(self, gone: int, count: int) -> int:
        """How long the list of a sequence with `count` pages gets when the first `gone` have left."""
        return count if self.window is None else min(count, gone + self.most)

    def leave(self, held: Held, length: int) -> None:
        """Give back what no token behind the first `length` ones sees."""
        first = min(self.first(length), len(held.pages))
        if first > held.gone:
            self.table.release(held.pages[held.gone : first])
            held.pages[held.gone : first] = [0] * (first - held.gone)
            held.gone = first


@dataclass(frozen=True, slots=True)
class Hit:
    """A cached prefix, acquired in every pool: full pages with these `keys`, then `shared` tokens of one more."""

    keys: list[bytes]
    matches: tuple[Match, ...]

    @property
    def shared(self) -> int:
        return self.matches[0].shared

    @property
    def held(self) -> list[Held]:
        """In every pool all pages that were acquired, and those in front of them."""
        return [Held(m.pages + ([] if m.source is None else [m.source]), m.gone) for m in self.matches]


class _Prefix:
    """The pages of a prompt with their keys, made as far as they are asked for."""

    def __init__(self, start: bytes, tokens: Sequence[int], size: int) -> None:
        self.keys: list[bytes] = []
        self._start, self._tokens, self._size = start, tokens, size
        self._packs: list[bytes] = []

    def parent(self, page: int) -> bytes:
        """The key of all before a page."""
        return self.keys[page - 1] if page else self._start

    def at(self, page: int) -> tuple[bytes, bytes, bytes]:
        """The key of all before a page, its tokens, its key."""
        while page >= len(self.keys):
            at = len(self.keys) * self._size
            self._packs.append(pack(self._tokens[at : at + self._size]))
            self.keys.append(chain(self.parent(len(self.keys)), self._packs[-1]))
        return self.parent(page), self._packs[page], self.keys[page]


def unrolled(lent: Sequence[int], count: int) -> list[int]:
    """The page table of `count` pages of which those in sight are all that is ever read: the lent ones, in turn."""
    return [lent[page % len(lent)] for page in range(count)]


class Pools:
    """Never empty; the pool whose layers see most comes first. Not thread-safe."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.all = tuple(pools)
        self.page_size = pools[0].table.page_size

    @classmethod
    def fitting(
        cls, geometry: CacheGeometry, counts: Sequence[int], below: Sequence["Tiers"], *, context: int, new: int
    ) -> "Pools":
        """For sequences of up to `context` tokens, computed `new` at a time. counts: pages of every group; below: what
        every page table has below it. Raises UsageError where the windows are not for such a context."""
        pools = []
        for group, count, tiers in zip(geometry.groups, counts, below, strict=True):
            window, size = group.window, geometry.page_size
            if useful_window(window, context, size) != window:
                raise UsageError(f"the key/value cache keeps {window} tokens of a context of {context}: no window")
            table = PageTable(count, page_size=size, below=tiers, loose=window is not None)
            least = pages_seen(window, 1, size, count)
            pools.append(Pool(table, window, max(least, min(pages_seen(window, new, size, count), count - 1))))
        return cls(pools)

    @classmethod
    def of(cls, table: PageTable) -> "Pools":
        """One pool, without a window."""
        return cls([Pool(table)])

    def __iter__(self) -> Iterator[Pool]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> Pool:
        return self.all[index]

    @property
    def version(self) -> int:
        """Changes whenever a page is taken, released, or holds something new."""
        return sum(pool.table.version for pool in self.all)

    @property
    def slide(self) -> bool:
        """Whether pages leave while a sequence goes on."""
        return any(pool.window is not None for pool in self.all)

    def match(self, tokens: Sequence[int], *, root: bytes | None = None, limit: int | None = None) -> Hit:
        """Acquire the longest prefix of tokens[:limit] under `root` that every pool has as much of as is needed."""
        limit = len(tokens) if limit is None else min(limit, len(tokens))
        start = root_key() if root is None else root
        while True:
            prefix = _Prefix(start, tokens, self.page_size)
            count = self.longest(limit // self.page_size, lambda pool, page, of=prefix: pool.table.knows(*of.at(page)))
            claimed = self._claim(prefix, count)
            if not isinstance(claimed, int):
                break
            limit = claimed * self.page_size  # something did not come back from below
        at, key = count * self.page_size, prefix.parent(count)
        rest = pack(tokens[at : min(at + self.page_size, limit)])
        return self._joined(prefix.keys[:count], claimed, [pool.table.claim_part(key, rest) for pool in self.all])

    def reach(self, places: Sequence[Place], counts: Sequence[int], parent: bytes, tokens: Sequence[int]) -> Hit | None:
        """See `PageTable.reach`: in every pool the last of these pages, as many as `counts` says. `gone` entries are
        put before them where there is a window, so that all keys have their place."""
        matches, parts = [], []
        for pool, count in zip(self.all, counts, strict=True):
            match = pool.table.reach(places[len(places) - count :], parent, tokens)
            if match is None:
                self.give_up(Hit([], tuple(matches)))
                return None
            gone = 0 if pool.window is None else len(places) - count
            matches.append(Match([0] * gone + match.pages, [], match.source, match.shared, gone))
            parts.append((match.source, match.shared))
        return self._joined([place[2] for place in places], matches, parts)

    def give_up(self, hit: Hit) -> None:
        """Release what was acquired."""
        for pool, match in zip(self.all, hit.matches, strict=False):  # not in all pools, where one failed
            pool.table.release(match.held)

    def reached(self, hit: Hit) -> int:
        """Tokens of a hit."""
        return len(hit.keys) * self.page_size + hit.shared

    def empty(self, gone: int) -> Hit:
        """Nothing acquired, for who goes on behind so many tokens without it."""
        firsts = [pool.first(gone) for pool in self.all]
        return Hit([], tuple(Match([0] * first, [], None, 0, first) for first in firsts))

    def let_go(self, held: Sequence[Held]) -> None:
        """Release these pages."""
        for pool, mine in zip(self.all, held, strict=False):
            pool.table.release(mine.pages[mine.gone :])

    def lend(self, tokens: int, new: int) -> list[list[int]]:
        """Pages of every pool for `tokens` tokens that nobody else will see, computed `new` at a time.

        With a window a few pages serve all of them in turn: see `unrolled`. Raises CacheFull.
        """
        lent: list[list[int]] = []
        try:
            for count, pool in zip(self.lending(tokens, new), self.all, strict=True):
                lent.append([])
                for _ in range(count):
                    lent[-1].append(pool.table.take())
        except CacheFull:
            self.take_back(lent)
            raise
        return lent

    def lending(self, tokens: int, new: int) -> list[int]:
        """How many pages of every pool `lend` takes."""
        count = -(-tokens // self.page_size)
        return [min(count, pages_seen(pool.window, new, self.page_size, count)) for pool in self.all]

    def take_back(self, lent: Sequence[Sequence[int]]) -> None:
        """The end of what `lend` gave."""
        for pool, pages in zip(self.all, lent, strict=False):
            pool.table.release(pages)

    def longest(self, count: int, there: Callable[[Pool, int], bool]) -> int:
        """The most pages, at most `count`, behind which every pool has what comes into sight: there(pool, page)."""
        best, runs = 0, [0] * len(self.all)
        for page in range(count):
            for index, pool in enumerate(self.all):
                runs[index] = runs[index] + 1 if there(pool, page) else 0
                if pool.window is None and runs[index] <= page:
                    return best
            length = (page + 1) * self.page_size
            if all(run >= page + 1 - pool.first(length) for run, pool in zip(runs, self.all, strict=True)):
                best = page + 1
        return best

    def fork(self, hit: Hit) -> tuple[list[int], tuple[PageCopy, ...]]:
        """The page of every pool that goes on after the shared tokens, and what must be copied first. Raises as
        `PageTable.fork` does: only where too few pages were left."""
        pages, copies = [], []
        for index, (pool, match) in enumerate(zip(self.all, hit.matches, strict=True)):
            page, copy = pool.table.fork(match)
            pages.append(page)
            if copy is not None:
                copies.append(PageCopy(copy.source, copy.target, copy.tokens, index))
        return pages, tuple(copies)

    def seal(self, held: Sequence[Held], page: int, parent: bytes, tokens: Sequence[int]) -> tuple[bool, bytes]:
        """Page number `page` of a sequence is full, in pools where it is in sight: whether it changed, and its key."""
        changed, key = False, chain(parent, pack(tokens))
        for pool, mine in zip(self.all, held, strict=True):
            if page < mine.gone:
                continue
            kept, _ = pool.table.seal(mine.pages[page], parent, tokens)
            changed |= kept != mine.pages[page]
            mine.pages[page] = kept
        return changed, key

    def record(self, held: Sequence[Held], page: int, parent: bytes, tokens: Sequence[int]) -> None:
        """See `PageTable.record`, in every pool."""
        for pool, mine in zip(self.all, held, strict=True):
            pool.table.record(mine.pages[page], parent, tokens)

    def release(self, held: Sequence[Held], keys: Sequence[bytes], *, matched: int, forget: bool) -> None:
        """Give all pages back. With `forget`, what was computed behind the first `matched` pages is in doubt."""
        for pool, mine in zip(self.all, held, strict=True):
            middle = max(matched, mine.gone)
            pool.table.release(mine.pages[middle:], forget=forget)
            pool.table.release(mine.pages[mine.gone : middle])
            if forget:  # what has left already is just as doubtful
                pool.table.forget(keys[matched : mine.gone])

    def clear(self) -> None:
        """Forget all idle pages."""
        for pool in self.all:
            pool.table.clear()

    def check(self) -> None:
        """Raise AssertionError unless every table is in order."""
        for pool in self.all:
            pool.table.check()

    def _claim(self, prefix: "_Prefix", count: int) -> list[Match] | int:
        """The pages in sight behind `count` of a prefix, acquired; or the number of one that did not come back."""
        claimed: list[Match] = []
        for pool in self.all:
            gone = min(pool.first(count * self.page_size), count)
            match = Match([0] * gone, [], None, 0, gone)
            claimed.append(match)
            for page in range(gone, count):
                found = pool.table.claim(*prefix.at(page))
                if found is None:
                    self.give_up(Hit([], tuple(claimed)))
                    return page
                match.pages.append(found)
        return claimed

    def _joined(self, keys: list[bytes], matches: Sequence[Match], parts: Sequence[tuple[int | None, int]]) -> Hit:
        """As much of one more page as all pools have."""
        shared = min(count for _, count in parts)
        found = []
        for pool, match, (source, _) in zip(self.all, matches, parts, strict=True):
            if source is not None and not shared:
                pool.table.release([source])
            found.append(Match(match.pages, keys, source if shared else None, shared, match.gone))
        return Hit(keys, tuple(found))
