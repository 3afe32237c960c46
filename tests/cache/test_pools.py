"""Pools: exact cases by hand, then random histories over memory that only knows what was written where."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from exl_runtime.cache.geometry import CacheGeometry, Group, first_seen, pages_seen, useful_window
from exl_runtime.cache.pages import PageTable
from exl_runtime.cache.pools import ENDLESS, Held, Hit, Pool, Pools, capacity, unrolled
from exl_runtime.cache.prefix import root_key
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.tiers import Part
from exl_runtime.cache.types import FP32
from exl_runtime.errors import CacheFull

SIZE = 4


@pytest.mark.parametrize("window", [1, 2, 4, 5, 9, 16])
@pytest.mark.parametrize("new", [1, 3, 4, 8, 11])
def test_what_is_seen_by_counting(window: int, new: int) -> None:
    most = 0
    for length in range(60):
        seen = [place for at in range(length, length + new) for place in range(max(0, at - window + 1), at + 1)]
        assert first_seen(window, length, SIZE) == min(seen) // SIZE
        most = max(most, len({place // SIZE for place in seen}))
    assert most == pages_seen(window, new, SIZE, 999)
    assert first_seen(None, 50, SIZE) == 0 and pages_seen(None, new, SIZE, 7) == 7


def test_groups_of_layers() -> None:
    geometry = CacheGeometry(5, 2, 8, FP32, SIZE, (6, None, 6, 9, None))
    assert geometry.groups == (Group(None, (1, 4)), Group(9, (3,)), Group(6, (0, 2)))
    assert sum(geometry.bytes_of(group) for group in geometry.groups) == geometry.bytes_per_page
    assert CacheGeometry(2, 2, 8, FP32, SIZE).groups == (Group(None, (0, 1)),)
    assert capacity(geometry, (30, 9, 9)) == 30 * SIZE
    assert capacity(CacheGeometry(1, 2, 8, FP32, SIZE, (6,)), (4,)) == ENDLESS
    assert capacity(CacheGeometry(1, 2, 8, FP32, SIZE, (6,)), (3,)) == 3 * SIZE
    assert useful_window(8, 6 * SIZE, SIZE) == 8 and useful_window(13, 6 * SIZE, SIZE) is None


def test_layers_lie_in_their_group() -> None:
    geometry = CacheGeometry(4, 1, 2, FP32, SIZE, (6, None, None, 6))
    kv = KVStorage(geometry, (5, 3), torch.device("cpu"))
    assert [kv.layer(i)[0].shape[0] for i in range(4)] == [3, 5, 5, 3]
    assert kv.nbytes == 2 * geometry.bytes_of(geometry.groups[0]) // 2 * 5 + geometry.bytes_of(geometry.groups[1]) * 3
    for i in range(4):
        for pages in kv.layer(i):
            pages[1] = i + 1
    kv.copy_page(1, 2, 3, 1)
    assert [float(kv.layer(i)[0][2].sum()) for i in range(4)] == [6.0, 0.0, 0.0, 24.0]
    part = Part.of(kv, 1)
    assert part.geometry.layers == 2 and part.layer(1)[0] is kv.layer(3)[0]


def test_lent_pages_go_round() -> None:
    pools = Pools([Pool(PageTable(9, page_size=SIZE)), Pool(PageTable(5, page_size=SIZE, loose=True), 6, 5)])
    lent = pools.lend(33, 8)
    assert [len(pages) for pages in lent] == [9, pages_seen(6, 8, SIZE, 99)]
    assert unrolled(lent[1], 9)[4:] == (2 * lent[1])[:5] and len(set(lent[1])) == len(lent[1])
    with pytest.raises(CacheFull):
        pools.lend(1, 1)
    pools.take_back(lent)
    assert [pool.table.available for pool in pools] == [9, 5]


@dataclass(eq=False)
class User:
    """What a sequence does with its pools."""

    tokens: list[int]
    held: list[Held]
    keys: list[bytes] = field(default_factory=list)
    matched: int = 0


PAGES = (7, 5, 4)
WINDOWS = (None, 6, 2)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class PoolMachine(RuleBasedStateMachine):
    """Two token values, three pools of few pages: collisions, sharing, leaving and eviction happen all the time."""

    @initialize(first=st.integers(0, 1))
    def start(self, first: int) -> None:
        kinds = list(zip(PAGES, WINDOWS, strict=True))[first:]
        tables = [PageTable(count, page_size=SIZE, loose=window is not None) for count, window in kinds]
        self.pools = Pools([Pool(table, w, 99) for table, (_, w) in zip(tables, kinds, strict=True)])
        self.memory = [[[None] * SIZE for _ in range(count)] for count, _ in kinds]
        self.users: list[User] = []

    def parent(self, user: User) -> bytes:
        return user.keys[-1] if user.keys else root_key()

    def write(self, user: User, token: int) -> bool:
        """Append a token; what is out of sight leaves first. False when there is no page."""
        index, offset = divmod(len(user.tokens), SIZE)
        for pool, mine in zip(self.pools, user.held, strict=True):
            if index == len(mine.pages):
                pool.leave(mine, len(user.tokens))
                try:
                    mine.pages.append(pool.table.take())
                except CacheFull:
                    return False
        user.tokens.append(token)
        for memory, mine in zip(self.memory, user.held, strict=True):
            memory[mine.pages[index]][offset] = tuple(user.tokens)
        if offset == SIZE - 1:
            user.keys.append(self.pools.seal(user.held, index, self.parent(user), user.tokens[-SIZE:])[1])
        return True

    @rule(prompt=TOKENS)
    def admit(self, prompt: list[int]) -> None:
        hit = self.pools.match(prompt, limit=len(prompt) - 1)
        count = self.pools.reached(hit)
        user = User(prompt[:count], [Held([*m.pages], m.gone) for m in hit.matches], [*hit.keys], len(hit.keys))
        if hit.shared:
            try:
                self.continue_in(user, hit)
            except CacheFull:
                self.pools.give_up(hit)
                return
        self.users.append(user)
        self.what_is_in_sight_is_right()
        for token in prompt[count:]:
            if not self.write(user, token):
                break

    def continue_in(self, user: User, hit: Hit) -> None:
        if any(pool.table.available == 0 for pool in self.pools):
            raise CacheFull("no room for a copy")
        pages, copies = self.pools.fork(hit)
        for mine, page in zip(user.held, pages, strict=True):
            mine.pages.append(page)
        for copy in copies:
            memory = self.memory[copy.pool]
            memory[copy.target][: copy.tokens] = memory[copy.source][: copy.tokens]
            self.pools[copy.pool].table.release([copy.source])

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99), tokens=TOKENS)
    def grow(self, which: int, tokens: list[int]) -> None:
        user = self.users[which % len(self.users)]
        for token in tokens:
            if not self.write(user, token):
                break

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99), forget=st.booleans())
    def end(self, which: int, forget: bool) -> None:
        user = self.users.pop(which % len(self.users))
        rest = user.tokens[len(user.keys) * SIZE :]
        if rest and not forget:
            self.pools.record(user.held, len(user.keys), self.parent(user), rest)
        self.pools.release(user.held, user.keys, matched=user.matched, forget=forget)

    @rule()
    def clear(self) -> None:
        self.pools.clear()

    @invariant()
    def what_is_in_sight_is_right(self) -> None:
        """Everybody finds in every pool exactly what belongs to its own prefix, as far as the next token sees."""
        for user in getattr(self, "users", ()):
            length = len(user.tokens)
            for pool, memory, mine in zip(self.pools, self.memory, user.held, strict=True):
                first = 0 if pool.window is None else max(0, length - pool.window + 1)
                assert mine.gone <= first // SIZE and mine.pages[: mine.gone] == [0] * mine.gone
                for place in range(first, length):
                    assert memory[mine.pages[place // SIZE]][place % SIZE] == tuple(user.tokens[: place + 1])

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "pools"):
            return
        self.pools.check()
        for number, pool in enumerate(self.pools):
            held = [page for user in self.users for page in user.held[number].pages[user.held[number].gone :]]
            assert pool.table.available == pool.table.pages - len(set(held))
            assert all(pool.table.references(page) == held.count(page) for page in held)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
test_random_histories = PoolMachine.TestCase
