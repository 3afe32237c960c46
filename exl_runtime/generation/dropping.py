"""Conversations whose oldest turns left: what followed them is still there, and is not computed again.

The prompt is then the first tokens (what stands before any turn), a gap, and tokens that were computed behind the gap.
Their keys and values are copied as they are, to where the shorter prompt has them: positions go on growing, and the
first tokens are turned along, from a copy of them as first computed, as in a window that rolls. Such pages depend on
what left and on when it did. So they begin at a root of their own, and only a prompt that says it has lost the very
same turns (`Left`) may find them, all of what was in place when they left; else it is computed from its beginning.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ..cache.pools import Held, Hit, Pools
from ..cache.prefix import common_tokens, pack
from ..cache.rows import slots_of
from ..cache.sinks import SinkKeeper, Sinks
from ..errors import StorageError
from .sequence import Sequence

KEPT = 64  # conversations that are remembered,
STATES = 4  # each with so many ways in which the same turns left it


@dataclass(frozen=True, slots=True)
class State:
    """How the pages of a conversation without its oldest turns came about.

    root   where their keys begin
    base   where those of the same tokens would begin, had nothing left
    head   first tokens, which are `shift` positions later than their index, as all that follow
    until  tokens that were in place when the turns left: only who finds them all can go on
    """

    root: bytes
    base: bytes
    head: int
    shift: int
    until: int

    def to_json(self, past: bytes) -> dict[str, Any]:
        """What `Dropper.learn` takes, less the root; `past`: what left."""
        names = ("head", "shift", "until")
        return {"past": past.hex(), "base": self.base.hex(), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, slots=True)
class Move:
    """Make `state` from the pages `held` of the sequence as it was: tokens `start` ... state.until - 1 were `gap`
    later there. `sinks`: the first state.head tokens as first computed; None: they are computed again."""

    state: State
    held: list[Held]
    start: int
    gap: int
    sinks: Sinks | None

    @property
    def reused(self) -> int:
        """Tokens that are not computed."""
        return self.state.until - self.start + (0 if self.sinks is None else self.state.head)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a sequence can go on: behind `hit`, found in `state` (None: nothing ever left), or behind `move`."""

    hit: Hit
    state: State | None = None
    move: Move | None = None

    @property
    def held(self) -> list[Held]:
        """Pages that are held until the sequence has its own."""
        return [] if self.move is None else self.move.held


class Dropper:
    """Finds and makes such states. Not thread-safe, as the scheduler around it; but for `knows`."""

    def __init__(self, pools: Pools, sinks: SinkKeeper) -> None:
        self.pools = pools
        self.sinks = sinks
        self._states: dict[bytes, dict[bytes, State]] = {}  # what left -> root -> state; the latest last

    def knows(self, past: bytes) -> bool:
        """True when a conversation went on after exactly these turns had left. From any thread."""
        return past in self._states

    def states(self, past: bytes) -> list[State]:
        """How conversations that lost these turns may lie in the cache, the latest first."""
        return [*reversed(list(self._states.get(past, {}).values()))]

    def learn(self, root: bytes, given: Mapping[str, Any]) -> None:
        """Note a state that somebody else had, `given` by `State.to_json`. Raises StorageError where it is none."""
        try:
            head, shift, until = (int(given[name]) for name in ("head", "shift", "until"))
            past, base = (bytes.fromhex(given[name]) for name in ("past", "base"))
            if not (0 < head < until < 1 << 31 and 0 < shift < 1 << 40 and len(past) == len(base) == len(root)):
                raise ValueError(given)
        except (KeyError, TypeError, ValueError) as err:
            raise StorageError("a snapshot says of turns that left what cannot be") from err
        self._remember(past, State(root, base, head, shift, until))

    def find(self, sequence: Sequence, limit: int) -> Start:
        """The best place to go on with a sequence that waits, and that has lost turns; its pages are acquired."""
        left = sequence.left_turns
        assert left is not None
        tokens, pools = sequence.tokens, self.pools
        best = Start(pools.match(tokens, root=sequence.base, limit=limit))
        most = pools.reached(best.hit)
        for state in self._known(left.past, sequence.base):
            hit = pools.match(tokens, root=state.root, limit=limit)
            reached = pools.reached(hit)
            better = reached >= most if best.state is None else reached > most
            if better and reached >= state.until:
                self.leave(best)
                best, most = Start(hit, state), reached
            else:
                pools.give_up(hit)
        if left.whole:
            move = self._move(sequence)
            if move is not None and move.reused > most:
                self.leave(best)
                best = Start(pools.empty(move.state.until), move.state, move)
            elif move is not None:
                pools.let_go(move.held)
        return best

    def leave(self, start: Start) -> None:
        """The sequence does not go on there."""
        self.pools.give_up(start.hit)
        self.pools.let_go(start.held)

    def adopt(self, sequence: Sequence, start: Start) -> int:
        """The sequence has pages for all its tokens and goes on at `start`. How many were moved into place."""
        left, state, move = sequence.left_turns, start.state, start.move
        assert left is not None
        self._remember(left.past, state)
        if state is None:
            return 0
        sequence.root, sequence.shift = state.root, state.shift
        if move is None:
            return 0
        size, until, gap = self.pools.page_size, state.until, move.gap
        for group, (pool, was, now) in enumerate(zip(self.pools, move.held, sequence.held, strict=True)):
            start = move.start if pool.window is None else max(move.start, until - pool.window + 1)
            sources = slots_of(was.pages, size, start + gap, until + gap)
            self.sinks.move(group, sources, slots_of(now.pages, size, start, until))
        if move.sinks is not None:
            shift, planned = state.shift, sequence.planned
            self.sinks.write(move.sinks, sequence.pages, shift=shift, planned=planned, tokens=state.head)
            sequence.kv_length = sequence.draft_length = state.head
        sequence.placed = (move.start, state.until)
        sequence.reach(sequence.kv_length)
        return move.reused

    def _known(self, past: bytes, base: bytes) -> Iterator[State]:
        """The latest first."""
        return (state for state in self.states(past) if state.base == base)

    def _remember(self, past: bytes, state: State | None) -> None:
        states = self._states.pop(past, {})
        self._states[past] = states
        if len(self._states) > KEPT:
            del self._states[next(iter(self._states))]
        if state is not None:
            states.pop(state.root, None)
            states[state.root] = state
            if len(states) > STATES:
                del states[next(iter(states))]

    def _move(self, sequence: Sequence) -> Move | None:
        """The longest run of tokens that can be taken from behind a gap; the pages it lies in are acquired."""
        left = sequence.left_turns
        assert left is not None
        tokens, whole = sequence.tokens, [*left.whole, *sequence.generated]
        gap = len(whole) - len(tokens)
        if gap <= 0:
            return None
        begin = common_tokens(pack(tokens), pack(whole))
        end = common_tokens(pack(tokens[::-1]), pack(whole[::-1]))
        best: Move | None = None
        for before in (None, *self._known(left.before, sequence.base)):
            found = self._behind(sequence, whole, before, gap=gap, begin=begin, end=end)
            if found is not None and (best is None or found.reused > best.reused):
                found, best = best, found
            if found is not None:
                self.pools.let_go(found.held)
        return best

    def _behind(
        self, sequence: Sequence, whole: list[int], before: State | None, *, gap: int, begin: int, end: int
    ) -> Move | None:
        """What can be taken from the pages of `whole` in the state `before`. The last token is computed in any case:
        its logits are wanted. begin, end: tokens that `whole` and the sequence have in common there."""
        pools, tokens = self.pools, sequence.tokens
        root = sequence.base if before is None else before.root
        hit = pools.match(whole, root=root, limit=len(whole) - 1)
        held, reached = hit.held, pools.reached(hit)
        # Only what nobody has turned yet can be turned; and behind it everything is where it was computed.
        head = min(begin, len(tokens) - 1, reached, begin if before is None else before.head)
        start = max(len(tokens) - end, head)
        until = reached - gap
        if head < 1 or until <= start or (before is not None and reached < before.until):
            pools.let_go(held)
            return None
        key = _key(b"head", sequence.base, tokens[:head])
        sinks = self.sinks.find(key) or self._keep(key, sequence, head, held[0].pages if before is None else None)
        # Where windows have let go of the first tokens, nothing but what comes from behind the gap may be in sight.
        if pools.slide and (sinks is None or start > head or any(pool.sees(until, start) for pool in pools)):
            pools.let_go(held)
            return None
        shift = gap + (0 if before is None else before.shift)
        shape = struct.pack("<qqqq", head, start, gap, sinks is None)
        state = State(_key(b"left" + shape, root, whole[:reached]), sequence.base, head, shift, until)
        return Move(state, held, start, gap, sinks)

    def _keep(self, key: bytes, sequence: Sequence, head: int, held: list[int] | None) -> Sinks | None:
        """Keep the first `head` tokens as they are in the pages `held`, or in any that begin like them."""
        pools = self.pools
        if pools[0].window is not None:  # nobody sees them again
            return self.sinks.keep(key, [])
        if held is not None:
            return self.sinks.keep(key, held[: -(-head // pools.page_size)])
        # In the first pool alone: it is the one whose layers still see them.
        match = pools[0].table.match(sequence.tokens, root=sequence.base, limit=head)
        there = len(match.pages) * pools.page_size + match.shared >= head
        sinks = self.sinks.keep(key, match.held) if there else None
        pools[0].table.release(match.held)
        return sinks


def _key(kind: bytes, root: bytes, tokens: list[int]) -> bytes:
    return blake2b(kind + root + pack(tokens), digest_size=16).digest()
