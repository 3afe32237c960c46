"""Pages of sequences whose oldest pages leave, among plain ones: a hit is never wrong, and nothing is lost.

What a page holds depends on the tokens before it and on what had left when it was computed; the memory below notes
exactly that, so any page found under a key it does not deserve is seen.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from exl_runtime.cache.pages import PageTable
from exl_runtime.cache.prefix import chain, pack, root_key
from exl_runtime.cache.window import Roll
from exl_runtime.errors import CacheFull

SIZE, PAGES = 2, 9
ROLLS = (Roll(3, 1, SIZE), Roll(4, 1, SIZE))


@dataclass(eq=False)
class User:
    """A sequence: all its tokens, the pages in sight behind the sinks' private copies, and the keys of all full pages.

    Until it has rolled, the sinks are the first of its pages.
    """

    roll: Roll
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    gone: int = 0  # pages, the sinks included once they are copies

    def parent(self) -> bytes:
        key = self.keys[-1] if self.keys else root_key()
        return self.roll.mark(key) if self.roll.gone(len(self.keys)) else key

    def content(self, count: int) -> object:
        """What the slot of token number count - 1 has to hold."""
        rolled = (count - 1) // SIZE >= self.roll.pages
        return tuple(self.tokens[:count]), self.roll if rolled else None


class RolledPages(RuleBasedStateMachine):
    """Two token values and few pages: eviction happens all the time."""

    @initialize()
    def start(self) -> None:
        self.table = PageTable(PAGES, page_size=SIZE)
        self.memory: list[list[object]] = [[None] * SIZE for _ in range(PAGES)]
        self.users: list[User] = []
        self.histories: list[tuple[Roll, list[int]]] = []

    def held(self) -> list[int]:
        return [page for user in self.users for page in (*user.copies, *user.pages)]

    def write(self, user: User, token: int) -> None:
        index, offset = divmod(len(user.tokens), SIZE)
        if index - user.gone == len(user.pages):
            if len(user.copies) + len(user.pages) == user.roll.pages:
                self.leave_one(user)
            user.pages.append(self.table.take())
        user.tokens.append(token)
        page = user.pages[index - user.gone]
        self.memory[page][offset] = user.content(len(user.tokens))
        if offset == SIZE - 1:
            page, key = self.table.seal(page, user.parent(), user.tokens[-SIZE:])
            user.pages[index - user.gone] = page
            user.keys.append(key)

    def leave_one(self, user: User) -> None:
        if not user.copies:
            sinks, leaving, rest = user.pages[:1], user.pages[1], user.pages[2:]
            if self.table.available + sum(self.table.references(page) == 1 for page in user.pages[:2]) < 2:
                raise CacheFull("full")
            self.table.detach(rest[0])
            self.table.release([*sinks, leaving])
            user.copies = [self.table.take()]
            user.pages, user.gone = rest, 2
        else:
            self.table.detach(user.pages[1])
            self.table.release(user.pages[:1])
            del user.pages[0]
            user.gone += 1

    def grow_by(self, user: User, tokens: list[int]) -> None:
        for token in tokens:
            try:
                self.write(user, token)
            except CacheFull:
                return

    @rule(roll=st.sampled_from(ROLLS), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def begin(self, roll: Roll, tokens: list[int]) -> None:
        match = self.table.match(tokens, limit=min(len(tokens) - 1, roll.capacity))
        if match.source is not None:
            self.table.release([match.source])
        user = User(roll, tokens[: len(match.pages) * SIZE], list(match.pages), list(match.keys))
        self.users.append(user)
        self.grow_by(user, tokens[len(user.tokens) :])

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow(self, which: int, tokens: list[int]) -> None:
        self.grow_by(self.users[which % len(self.users)], tokens)

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99), forget=st.booleans())
    def leave(self, which: int, forget: bool) -> None:
        user = self.users.pop(which % len(self.users))
        rest = user.tokens[len(user.keys) * SIZE :]
        if rest and not forget:
            self.table.record(user.pages[len(user.keys) - user.gone], user.parent(), rest)
        self.table.release([*user.copies, *user.pages], forget=forget)
        self.histories = [*self.histories[-5:], (user.roll, user.tokens)]

    @precondition(lambda self: self.histories)
    @rule(which=st.integers(0, 99), other=st.booleans(), tokens=st.lists(st.integers(0, 1), max_size=4))
    def resume(self, which: int, other: bool, tokens: list[int]) -> None:
        """Go on with a history, if what it sees is still there; perhaps with one that rolled in another way."""
        roll, before = self.histories[which % len(self.histories)]
        roll = ROLLS[1 - ROLLS.index(roll)] if other else roll
        known = [*before, *tokens]
        user, places = User(roll), []
        for page in range(len(known) // SIZE):
            parent, packed = user.parent(), pack(known[page * SIZE : (page + 1) * SIZE])
            user.keys.append(chain(parent, packed))
            places.append((parent, packed, user.keys[-1]))
        first = len(user.keys) - roll.pages + 2
        if first < 2 or not self.table.available:
            return
        match = self.table.reach(places[first:], user.parent(), known[len(user.keys) * SIZE :])
        assert (match is not None) == all(self.table.knows(*place) for place in places[first:])
        if match is None:
            return
        if match.source is not None:
            self.table.release([match.source])
        user.pages, user.gone, user.tokens = list(match.pages), first, known[: len(user.keys) * SIZE]
        if not self.table.available:
            self.table.release(user.pages)
            return
        user.copies = [self.table.take()]
        self.users.append(user)

    @invariant()
    def hits_are_right(self) -> None:
        for user in getattr(self, "users", ()):
            for place in range(user.gone * SIZE, len(user.tokens)):
                index, offset = divmod(place, SIZE)
                assert self.memory[user.pages[index - user.gone]][offset] == user.content(place + 1)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "table"):
            self.table.check()
            held = self.held()
            assert self.table.available == PAGES - len(set(held))
            assert all(self.table.references(page) == held.count(page) for page in held)


RolledPages.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
test_random_histories = RolledPages.TestCase
