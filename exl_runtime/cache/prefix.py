"""What the pages hold: a tree of token prefixes, addressed by chained hashes. Knows no tensors and no reference counts.

A page's key names its tokens and, through its parent's key, all tokens before them. So equal keys mean equal
prefixes, and every page of a prefix is reachable from the root one hash at a time.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

TOKEN_BYTES = array("i").itemsize


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as 32-bit integers in the machine's byte order: compared and hashed at C speed."""
    return array("i", tokens).tobytes()


def chain(parent: bytes, packed: bytes) -> bytes:
    """The key of a page: 16 bytes that stand for its tokens and all those before them."""
    return blake2b(parent + packed, digest_size=16).digest()


def root_key(namespace: int = 0) -> bytes:
    """Where a tree begins. Keys and values are shared only within one namespace (for example one rope length)."""
    return blake2b(b"root %d" % namespace, digest_size=16).digest()


def common_tokens(a: bytes, b: bytes) -> int:
    """Length in tokens of the longest common beginning of two packed token strings."""
    low, high = 0, min(len(a), len(b)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * TOKEN_BYTES : middle * TOKEN_BYTES] == b[low * TOKEN_BYTES : middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True, slots=True)
class Node:
    """What one page holds. `key` is None while the page is not full; `first` marks the first page of a prefix,
    and one whose parent may be gone."""

    parent: bytes
    packed: bytes
    key: bytes | None
    first: bool

    @property
    def tokens(self) -> int:
        return len(self.packed) // TOKEN_BYTES


class PrefixTree:
    """Page -> node, key -> page, and parent key -> pages that follow it. `loose`: no page needs its parent."""

    def __init__(self, *, loose: bool = False) -> None:
        self._loose = loose
        self.nodes: dict[int, Node] = {}
        self._sealed: dict[bytes, int] = {}
        self._children: dict[bytes, dict[int, None]] = {}

    def find(self, key: bytes) -> int | None:
        """The full page with this key."""
        return self._sealed.get(key)

    def children(self, parent: bytes) -> Iterator[tuple[int, Node]]:
        """Pages that directly follow the prefix `parent`, full or not."""
        return ((page, self.nodes[page]) for page in self._children.get(parent, ()))

    def longest(self, parent: bytes, packed: bytes) -> tuple[int, int] | None:
        """(page, n): the page after `parent` that shares the most first tokens with `packed`; None if none does."""
        best, page_of_best = 0, -1
        for page, node in self.children(parent):
            ahead = (best + 1) * TOKEN_BYTES  # a better one has at least these in common
            if len(packed) < ahead:
                break
            if node.packed[:ahead] == packed[:ahead]:
                best, page_of_best = common_tokens(node.packed, packed), page
        return (page_of_best, best) if best else None

    def add(self, page: int, parent: bytes, packed: bytes, key: bytes | None) -> None:
        """Say what `page` holds, replacing what was said before."""
        self.remove(page)
        self.nodes[page] = Node(parent, packed, key, self._loose or parent not in self._sealed)
        self._children.setdefault(parent, {})[page] = None
        if key is not None:
            self._sealed[key] = page

    def remove(self, page: int) -> None:
        """Forget what `page` holds, if anything."""
        node = self.nodes.pop(page, None)
        if node is None:
            return
        siblings = self._children[node.parent]
        del siblings[page]
        if not siblings:
            del self._children[node.parent]
        if node.key is not None:
            del self._sealed[node.key]

    def detach(self, page: int) -> None:
        """Let `page` stand for itself: it can be found by its key even when its parent is gone."""
        node = self.nodes.get(page)
        if node is not None and not node.first:
            self.nodes[page] = replace(node, first=True)

    def is_leaf(self, page: int) -> bool:
        """True when no page follows this one."""
        key = self.nodes[page].key
        return key is None or key not in self._children

    def check(self, page_size: int) -> None:
        """Raise AssertionError unless the three maps agree and no page has lost its parent."""
        assert {page: node.key for page, node in self.nodes.items() if node.key} == {
            page: key for key, page in self._sealed.items()
        }, "sealed pages and keys disagree"
        assert {(node.parent, page) for page, node in self.nodes.items()} == {
            (parent, page) for parent, pages in self._children.items() for page in pages
        }, "children and parents disagree"
        for page, node in self.nodes.items():
            assert 0 < node.tokens <= page_size, f"page {page} holds {node.tokens} tokens"
            assert (node.tokens == page_size) == (node.key is not None), f"page {page}: full and sealed differ"
            assert node.key is None or node.key == chain(node.parent, node.packed), f"page {page}: wrong key"
            assert node.first or node.parent in self._sealed, f"page {page} has lost its parent"
