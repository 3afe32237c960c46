"""The page table: exact cases by hand, then random histories in which a wrong hit or a lost page must show."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from exl_runtime.cache.pages import PageTable
from exl_runtime.cache.prefix import chain, common_tokens, pack, root_key
from exl_runtime.errors import CacheFull

ROOT = root_key()


def fill(table: PageTable, tokens: Sequence[int], root: bytes = ROOT) -> list[int]:
    """Compute `tokens` from nothing: take, seal and record like a sequence. The pages stay held."""
    size, key, pages = table.page_size, root, []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        page = table.take()
        if len(part) == size:
            page, key = table.seal(page, key, part)
        else:
            table.record(page, key, part)
        pages.append(page)
    return pages


def reused(table: PageTable, tokens: Sequence[int], root: bytes = ROOT) -> int:
    """How many tokens a match finds; everything is given back."""
    match = table.match(tokens, root=root)
    table.release([*match.pages, *([] if match.source is None else [match.source])])
    return len(match.pages) * table.page_size + match.shared


def test_common_tokens() -> None:
    for a, b, length in (([], [1], 0), ([1], [2], 0), ([1, 2, 3], [1, 2], 2), ([5, 6, 7, 8], [5, 6, 9, 8], 2)):
        assert common_tokens(pack(a), pack(b)) == length
    assert common_tokens(pack([256]), pack([257])) == 0  # half of the bytes are equal


def test_a_key_names_the_whole_prefix() -> None:
    keys = {chain(root, pack(tokens)) for root in (root_key(0), root_key(1)) for tokens in ([1, 2], [1, 3], [2, 1])}
    assert len(keys) == 6 and all(len(key) == 16 for key in keys)
    assert chain(chain(ROOT, pack([1])), pack([2])) != chain(chain(ROOT, pack([2])), pack([2]))


def test_full_pages_then_part_of_one() -> None:
    table = PageTable(8, page_size=4)
    pages = fill(table, range(10))
    for held in (True, False):
        if not held:
            table.release(pages)
        assert reused(table, range(10)) == 10
        assert reused(table, [*range(9), 77]) == 9
        assert reused(table, range(7)) == 7  # part of a full page
        assert reused(table, [0, 1, 77]) == 2
        assert reused(table, [77, 1]) == 0
        assert reused(table, range(10), root_key(5)) == 0
    assert table.match(range(10), limit=8).shared == 0
    table.check()


def test_equal_prefixes_share_one_page() -> None:
    table = PageTable(8, page_size=4)
    first, second = fill(table, range(8)), fill(table, range(8))
    assert first == second
    assert [table.references(page) for page in first] == [2, 2]
    assert table.available == 6
    table.release(first)
    assert table.idle == 0
    table.release(second)
    assert (table.idle, table.available) == (2, 8)


def test_a_longer_tail_replaces_a_shorter_one() -> None:
    table = PageTable(8, page_size=4)
    table.release(fill(table, [1, 2]))
    assert table.idle == 1
    table.release(fill(table, [1, 2, 3]))
    assert table.idle == 1 and reused(table, [1, 2, 3]) == 3
    table.release(fill(table, [1]))  # known already
    assert table.idle == 1
    table.release(fill(table, [1, 2, 3, 4]))
    assert table.idle == 1 and reused(table, [1, 2, 3, 4]) == 4
    table.release(fill(table, [1, 9]))  # another branch
    assert table.idle == 2
    table.check()


def test_fork_goes_on_in_place_only_where_nothing_is_lost() -> None:
    table = PageTable(8, page_size=4)
    tail = fill(table, [1, 2, 3])
    match = table.match([1, 2, 3, 9])
    page, copy = table.fork(match)  # its first owner still writes to it
    assert page != tail[0] and copy is not None
    assert (copy.source, copy.target, copy.tokens) == (tail[0], page, 3)
    table.release([copy.source])
    table.release([page])
    table.release(tail)
    assert table.fork(table.match([1, 2, 3, 9])) == (tail[0], None)
    table.release(tail)
    match = table.match([1, 2, 8])  # the third token would be lost
    page, copy = table.fork(match)
    assert page != tail[0] and copy is not None and copy.tokens == 2
    table.release([copy.source])
    table.release([page])
    assert reused(table, [1, 2, 3]) == 3
    table.check()


def test_fork_without_a_free_page() -> None:
    table = PageTable(1, page_size=4)
    table.release(fill(table, [1, 2, 3, 4]))
    match = table.match([1, 2, 9])
    assert table.fork(match) == (0, None)  # the only page: what follows the match goes
    assert reused(table, [1, 2, 3, 4]) == 0
    table.release([0])
    assert table.available == 1
    held = fill(table, [1, 2, 3, 4])
    match = table.match([1, 2, 9])
    with pytest.raises(CacheFull):
        table.fork(match)
    table.release([0])
    table.release(held)
    table.check()


def test_take_order_blank_then_oldest_leaf() -> None:
    table = PageTable(5, page_size=2)
    old, new = fill(table, [1, 1, 2, 2]), fill(table, [5, 5, 6, 6])
    table.release(old)
    table.release(new)
    taken = [table.take() for _ in range(5)]
    assert taken[1:] == [old[1], old[0], new[1], new[0]]
    with pytest.raises(CacheFull, match=r"5 pages \(10 tokens\)"):
        table.take()
    table.release(taken)
    assert (table.idle, table.available) == (0, 5)


def test_use_renews_a_prefix_together_with_its_parents() -> None:
    table = PageTable(4, page_size=2)
    old, new = fill(table, [1, 1, 2, 2]), fill(table, [5, 5, 6, 6])
    table.release(old)
    table.release(new)
    assert reused(table, [1, 1, 2, 2]) == 4
    assert [table.take() for _ in range(4)] == [new[1], new[0], old[1], old[0]]


def test_forget_spares_what_others_have() -> None:
    table = PageTable(8, page_size=2)
    mine = fill(table, [1, 1, 2, 2, 3])
    theirs = fill(table, [1, 1, 2, 2, 4])
    table.release(mine, forget=True)
    assert reused(table, [1, 1, 2, 2, 3]) == 4
    table.release(theirs)
    assert reused(table, [1, 1, 2, 2, 4]) == 5
    alone = fill(table, [7, 7, 8])
    table.release(alone, forget=True)
    assert reused(table, [7, 7, 8]) == 0
    table.check()


def test_forget_spares_what_something_idle_follows() -> None:
    table = PageTable(8, page_size=2)
    mine = fill(table, [1, 1, 2, 2])
    table.release(fill(table, [1, 1, 3, 3]))
    table.release(mine, forget=True)
    table.check()
    assert reused(table, [1, 1, 3, 3]) == 4 and reused(table, [1, 1, 2, 2]) == 2


def test_finding_the_same_again_renews_it() -> None:
    table = PageTable(4, page_size=2)
    first, second = fill(table, [1]), fill(table, [5])
    table.release(first)
    table.release(second)
    table.release(fill(table, [1]))  # a beginning of what is there: its page is not kept, the other is renewed
    taken = [table.take() for _ in range(4)]
    assert taken.index(second[0]) < taken.index(first[0])


def test_clear() -> None:
    table = PageTable(4, page_size=2)
    held = fill(table, [1, 1])
    table.release(fill(table, [2, 2, 3]))
    table.clear()
    assert (table.idle, table.available) == (0, 3)
    assert reused(table, [1, 1]) == 2 and reused(table, [2, 2]) == 0
    table.release(held)
    table.check()


def test_check_sees_a_lost_page() -> None:
    table = PageTable(2, page_size=2)
    table._references[table.take()] = 0
    with pytest.raises(AssertionError, match="lost"):
        table.check()


@dataclass(eq=False)
class User:
    """What a sequence does with the table, over memory that only knows what was written where."""

    namespace: int
    tokens: list[int]
    pages: list[int]
    keys: list[bytes]

    @property
    def parent(self) -> bytes:
        return self.keys[-1] if self.keys else root_key(self.namespace)


SIZE, PAGES = 4, 6
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class PageMachine(RuleBasedStateMachine):
    """Two token values, six pages of four: collisions, sharing and eviction happen all the time."""

    @initialize()
    def start(self) -> None:
        self.table = PageTable(PAGES, page_size=SIZE)
        self.memory: list[list[object]] = [[None] * SIZE for _ in range(PAGES)]
        self.users: list[User] = []

    def write(self, user: User, token: int) -> None:
        index, offset = divmod(len(user.tokens), SIZE)
        user.tokens.append(token)
        self.memory[user.pages[index]][offset] = (user.namespace, tuple(user.tokens))
        if offset == SIZE - 1:
            page, key = self.table.seal(user.pages[index], user.parent, user.tokens[-SIZE:])
            user.pages[index] = page
            user.keys.append(key)

    def record(self, user: User) -> None:
        rest = user.tokens[len(user.keys) * SIZE :]
        if rest:
            self.table.record(user.pages[len(user.keys)], user.parent, rest)

    @rule(prompt=TOKENS, namespace=st.integers(0, 1))
    def admit(self, prompt: list[int], namespace: int) -> None:
        match = self.table.match(prompt, root=root_key(namespace), limit=len(prompt) - 1)
        user = User(namespace, [], list(match.pages), list(match.keys))
        more = -(-len(prompt) // SIZE) - len(match.pages) - bool(match.shared)
        if more > self.table.available:
            self.give_up(match)
            return
        fresh = [self.table.take() for _ in range(more)]
        if match.source is not None:
            try:
                page, copy = self.table.fork(match)
            except CacheFull:
                self.table.release(fresh)
                self.give_up(match)
                return
            user.pages.append(page)
            if copy is not None:
                self.memory[copy.target][: copy.tokens] = self.memory[copy.source][: copy.tokens]
                self.table.release([copy.source])
        user.pages += fresh
        user.tokens = prompt[: len(match.pages) * SIZE + match.shared]
        self.users.append(user)
        self.hits_are_right()
        for token in prompt[len(user.tokens) :]:
            self.write(user, token)

    def give_up(self, match: object) -> None:
        self.table.release(match.pages if match.source is None else [*match.pages, match.source])

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1))
    def grow(self, which: int, token: int) -> None:
        user = self.users[which % len(self.users)]
        if len(user.tokens) == len(user.pages) * SIZE:
            try:
                user.pages.append(self.table.take())
            except CacheFull:
                return
        self.write(user, token)

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99))
    def make_findable(self, which: int) -> None:
        self.record(self.users[which % len(self.users)])

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99), forget=st.booleans())
    def leave(self, which: int, forget: bool) -> None:
        user = self.users.pop(which % len(self.users))
        if not forget:
            self.record(user)
        self.table.release(user.pages, forget=forget)

    @rule()
    def clear(self) -> None:
        self.table.clear()

    @invariant()
    def hits_are_right(self) -> None:
        """Everybody finds in its pages exactly what belongs to its own prefix."""
        for user in getattr(self, "users", ()):
            for position in range(len(user.tokens)):
                index, offset = divmod(position, SIZE)
                there = self.memory[user.pages[index]][offset]
                assert there == (user.namespace, tuple(user.tokens[: position + 1]))

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.check()
        held = {page for user in self.users for page in user.pages}
        assert self.table.available == PAGES - len(held)
        for page in held:
            assert self.table.references(page) == sum(user.pages.count(page) for user in self.users)

    def teardown(self) -> None:
        for user in getattr(self, "users", ()):
            self.table.release(user.pages)
        if hasattr(self, "table"):
            self.table.check()
            assert self.table.available == PAGES


PageMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
test_random_histories = PageMachine.TestCase
