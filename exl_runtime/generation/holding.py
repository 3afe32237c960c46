"""What the cache holds of a conversation, claimed for a snapshot: its beginning, or what is left of one that lost turns
or whose window rolled."""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace

from ..cache.pools import Hit, Pools
from ..cache.snapshot import Contents, longest_contents
from ..cache.window import Roll
from ..errors import CacheFull
from .dropping import Dropper
from .rolling import Roller


@dataclass(slots=True)
class Held:
    """`contents`, in pages that stay as they are until `release`."""

    pools: Pools
    contents: Contents
    hit: Hit
    sinks: list[int] = field(default_factory=list)

    def release(self) -> None:
        """Give the pages back."""
        self.pools.give_up(self.hit)
        self.pools[0].table.release(self.sinks)


def hold(
    roller: Roller,
    dropper: Dropper,
    tokens: Many[int],
    *,
    roots: Many[bytes],
    past: bytes,
    roll: Roll | None,
) -> Held:
    """As much of `tokens` as there is under one of `roots`. past: of turns that left before them, see `Left`; roll: how
    the conversation rolls, None: not at all."""
    pools = roller.pools
    best = Held(pools, *longest_contents(pools, roots, tokens))
    for state in dropper.states(past):
        contents, hit = longest_contents(pools, [state.root], tokens)
        worse = Held(pools, replace(contents, more={"left": state.to_json(past)}), hit)
        if len(contents.tokens) > max(len(best.contents.tokens), state.until - 1):
            worse, best = best, worse
        worse.release()
    if roll is not None and not pools.slide:
        for root in roots:
            rolled = _rolled(pools, roller, tokens, root, roll)
            if rolled is not None and len(rolled.contents.tokens) > len(best.contents.tokens):
                rolled, best = best, rolled
            if rolled is not None:
                rolled.release()
    return best


def _rolled(pools: Pools, roller: Roller, tokens: Many[int], root: bytes, roll: Roll) -> Held | None:
    """The sinks as first computed, and the pages in sight; None: they are not all there, or nothing has left."""
    found = roller.reused(list(tokens), root, roll)
    opened = roller.open(found, roll, len(tokens)) if found.places else None
    if opened is None:
        return None
    hit, sinks = opened
    assert sinks is not None
    pages: list[int] = []
    try:
        for _ in range(roll.sinks):
            pages.append(pools[0].table.take())
    except CacheFull:
        pools[0].table.release(pages)
        pools.give_up(hit)
        return None
    roller.sinks.write(sinks, pages, shift=0, planned=0)
    (match,) = hit.matches
    last = [] if match.source is None else [match.source]
    full = found.reused // roll.page_size
    first = full - len(match.pages)
    listed = [*pages, *[0] * (first - roll.sinks), *match.pages, *last]
    count = found.reused + match.shared
    return Held(pools, Contents(root, tuple(tokens[:count]), [listed], [first], roll), hit, pages)
