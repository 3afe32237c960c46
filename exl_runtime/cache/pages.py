"""The page table: which pages are in use, what they hold, and which one goes next. Integers and hashes, no tensors.

A page is in one of three states:
  blank  nobody uses it and it holds nothing that could be found again
  held   in use: its reference count is positive; at most one holder writes to it, and only past what is recorded
  idle   nobody uses it, but what it holds can be found again; the least recently released is reused first

Pages are released leaf first, so a parent is always younger than its children, and reuse never orphans a prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..errors import CacheFull
from .geometry import PAGE_SIZE
from .prefix import TOKEN_BYTES, PrefixTree, chain, pack, root_key

if TYPE_CHECKING:
    from .tiers import Tiers


Place: TypeAlias = tuple[bytes, bytes, bytes]  # of a full page: key of what is before it, its tokens (`pack`), its key


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy the first `tokens` tokens of page `source` to page `target` of pool number `pool`; `source` stays held until
    that is done."""

    source: int
    target: int
    tokens: int
    pool: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """A cached prefix, acquired: full `pages` with their `keys`, then the first `shared` tokens of page `source`.

    The first `gone` of `pages` are out of sight: 0, not acquired.
    """

    pages: list[int]
    keys: list[bytes]
    source: int | None
    shared: int
    gone: int = 0

    @property
    def held(self) -> list[int]:
        """All pages that were acquired."""
        return self.pages[self.gone :] + ([] if self.source is None else [self.source])


class PageTable:
    """Reference counts over `pages` pages of `page_size` tokens, and the prefixes they hold. Not thread-safe.

    `below`: where the content of reused pages goes, and comes back from; None: it is gone. `loose`: sequences give
    their first pages back while they go on, so a page may be found although what was before it is not there.
    """

    def __init__(
        self, pages: int, *, page_size: int = PAGE_SIZE, below: "Tiers | None" = None, loose: bool = False
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        self.below = below
        self.version = 0  # changes whenever a page is taken, released, or holds something new
        self.evictions = 0  # pages that were reused although they held something
        self._references = [0] * pages
        self._blank = list(range(pages - 1, -1, -1))
        self._idle: dict[int, None] = {}  # oldest first
        self._tree = PrefixTree(loose=loose)

    @property
    def available(self) -> int:
        """Pages that `take` can still hand out."""
        return len(self._blank) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody uses and that hold something reusable."""
        return len(self._idle)

    def references(self, page: int) -> int:
        """How many holders a page has."""
        return self._references[page]

    def match(self, tokens: Sequence[int], *, root: bytes | None = None, limit: int | None = None) -> Match:
        """Acquire the longest cached prefix of tokens[:limit] under `root`: full pages, then part of one more."""
        key = root_key() if root is None else root
        limit = len(tokens) if limit is None else min(limit, len(tokens))
        size = self.page_size
        pages: list[int] = []
        keys: list[bytes] = []
        start = 0
        while start + size <= limit:
            packed = pack(tokens[start : start + size])
            following = chain(key, packed)
            page = self.claim(key, packed, following)
            if page is None:
                break
            pages.append(page)
            keys.append(following)
            key = following
            start += size
        return Match(pages, keys, *self.claim_part(key, pack(tokens[start : min(start + size, limit)])))

    def knows(self, parent: bytes, packed: bytes, key: bytes) -> bool:
        """True while the full page `key`, `packed` behind `parent`, can be claimed, memory permitting."""
        if self._tree.find(key) is not None:
            return True
        return self.below is not None and self.below.find(parent, packed, key) is not None

    def claim(self, parent: bytes, packed: bytes, key: bytes) -> int | None:
        """The full page `key`, acquired; it may come back from below. None: it does not."""
        page = self._tree.find(key)
        if page is None:
            return self._bring_back(parent, packed, key)
        self._acquire(page)
        return page

    def claim_part(self, parent: bytes, packed: bytes) -> tuple[int | None, int]:
        """(page, n): a page behind `parent`, acquired, that shares the first n tokens with `packed`; (None, 0)."""
        found = self._tree.longest(parent, packed)
        page = self._bring_back(parent, packed, None, beyond=found[1] if found else 0)
        if page is not None:
            return page, self._tree.nodes[page].tokens
        if found is None:
            return None, 0
        self._acquire(found[0])
        return found

    def reach(self, wanted: Sequence[Place], parent: bytes, tokens: Sequence[int]) -> Match | None:
        """Acquire these full pages, which follow each other, whatever has become of what was before them; then part of
        one more, whose key follows `parent`, that begins like `tokens`. None: one of them does not come back."""
        pages: list[int] = []
        for place in wanted:
            page = self.claim(*place)
            if page is None:
                self.release(pages)
                return None
            if not pages:
                self._tree.detach(page)
            pages.append(page)
        return Match(pages, [place[2] for place in wanted], *self.claim_part(parent, pack(tokens)))

    def detach(self, page: int) -> None:
        """What comes before `page` is about to be released; the page itself stays in use."""
        self._tree.detach(page)

    def fork(self, match: Match) -> tuple[int, PageCopy | None]:
        """A page to go on writing after match.shared tokens, and the copy that must be made first, if any.

        Where nobody else needs the tokens that follow in match.source, that page itself goes on. After the copy,
        release its source. Raises CacheFull (match.source stays held) when a page is needed and there is none.
        """
        source = match.source
        assert source is not None, "fork needs a partial match"
        node = self._tree.nodes[source]
        alone = self._references[source] == 1
        if alone and node.tokens == match.shared and node.key is None:
            return source, None
        try:
            page = self.take()
        except CacheFull:
            if not (alone and self._tree.is_leaf(source)):
                raise
            self._tree.remove(source)
            return source, None
        return page, PageCopy(source, page, match.shared)

    def take(self) -> int:
        """A page to write to: a blank one, else the one that has been idle longest. Raises CacheFull."""
        if self._blank:
            page = self._blank.pop()
        elif self._idle:
            page = next(iter(self._idle))
            if self.below is not None:
                self.below.spill(page, self._tree.nodes[page])
            del self._idle[page]
            self._tree.remove(page)
            self.evictions += 1
        else:
            raise CacheFull(
                f"all {self.pages} pages ({self.pages * self.page_size} tokens) of the key/value cache are in use",
                hint="wait for a request to finish, or raise --context",
            )
        self._references[page] = 1
        self.version += 1
        return page

    def seal(self, page: int, parent: bytes, tokens: Sequence[int]) -> tuple[int, bytes]:
        """A held page is full of `tokens`. Returns the page to keep, and its key: equal prefixes share one page."""
        assert len(tokens) == self.page_size, "only full pages are sealed"
        packed = pack(tokens)
        key = chain(parent, packed)
        known = self._tree.find(key)
        if known == page:
            return page, key
        if known is not None:
            self._acquire(known)
            self._tree.remove(page)
            self.release([page])
            return known, key
        self._drop_beginnings(page, parent, packed)
        self._tree.add(page, parent, packed, key)
        self.version += 1
        return page, key

    def record(self, page: int, parent: bytes, tokens: Sequence[int]) -> None:
        """A held page that is not full begins with `tokens`: others may copy them, now and after its release."""
        assert 0 < len(tokens) < self.page_size, "a full page is sealed, an empty one has nothing to record"
        packed = pack(tokens)
        for other, node in self._tree.children(parent):
            if other != page and node.packed.startswith(packed):
                self._tree.remove(page)
                if other in self._idle:  # as good as new; its parents are held by our caller, so they stay younger
                    self._idle[other] = self._idle.pop(other)
                return
        self._drop_beginnings(page, parent, packed)
        self._tree.add(page, parent, packed, None)
        self.version += 1

    def release(self, held: Sequence[int], *, forget: bool = False) -> None:
        """Give up one reference to each page of a sequence, given in order. With `forget`, nothing becomes idle
        that only this holder had: for pages whose content is in doubt."""
        self.version += 1
        for page in reversed(held):  # leaf first
            assert self._references[page] > 0, f"page {page} is not held"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._tree.nodes and not (forget and self._tree.is_leaf(page)):
                self._idle[page] = None
            else:
                self._tree.remove(page)
                self._blank.append(page)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Forget the pages with these keys, which follow each other, that are idle and that no other page follows."""
        for key in reversed(keys):
            page = self._tree.find(key)
            if page is not None and page in self._idle and self._tree.is_leaf(page):
                del self._idle[page]
                self._tree.remove(page)
                self._blank.append(page)
                self.version += 1

    def clear(self) -> None:
        """Forget all idle pages."""
        for page in self._idle:
            self._tree.remove(page)
            self._blank.append(page)
        self._idle.clear()

    def check(self) -> None:
        """Raise AssertionError unless every invariant of this file holds."""
        self._tree.check(self.page_size)
        held = {page for page, count in enumerate(self._references) if count > 0}
        assert all(count >= 0 for count in self._references), "negative reference count"
        assert sorted([*self._blank, *self._idle, *held]) == list(range(self.pages)), "a page is lost or counted twice"
        assert not set(self._blank) & set(self._tree.nodes), "a blank page is still in the tree"
        assert set(self._idle) <= set(self._tree.nodes), "an idle page cannot be found"
        age = {page: position for position, page in enumerate(self._idle)}
        for page, node in self._tree.nodes.items():
            if node.first:
                continue
            parent = self._tree.find(node.parent)
            assert parent is not None
            if page in held:
                assert parent in held, f"page {page} is held, its parent {parent} is not"
            elif parent not in held:
                assert age[parent] > age[page], f"parent {parent} would be reused before its child {page}"

    def _bring_back(self, parent: bytes, packed: bytes, key: bytes | None, *, beyond: int = 0) -> int | None:
        """A page, held, with what the tiers have of `packed` behind `parent`: all of it where there is a key, else
        its beginning when that is longer than `beyond`. None: nothing, or no page to put it into."""
        found = None if self.below is None else self.below.find(parent, packed, key, beyond=beyond)
        if self.below is None or found is None or (key is None and found.shared == self.page_size):
            return None
        try:
            page = self.take()
        except CacheFull:
            return None
        if not self.below.restore(found, page):
            self.release([page])
            return None
        self._tree.add(page, parent, packed[: found.shared * TOKEN_BYTES], key)
        return page

    def _acquire(self, page: int) -> None:
        self._idle.pop(page, None)
        self._references[page] += 1

    def _drop_beginnings(self, page: int, parent: bytes, packed: bytes) -> None:
        """Idle pages that hold only a beginning of what `page` holds are of no more use."""
        useless = [
            other
            for other, node in self._tree.children(parent)
            if other != page and other in self._idle and node.key is None and packed.startswith(node.packed)
        ]
        for other in useless:
            del self._idle[other]
            self._tree.remove(other)
            self._blank.append(other)
