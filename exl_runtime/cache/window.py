"""What leaves when a context overflows. Arithmetic on lengths only: no tokens, no pages, no messages."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

SINKS = 4  # first tokens that always stay: attention leans on them (Xiao et al. 2023, "attention sinks")
REPLY_RESERVE = 256  # tokens kept free for a reply of which no length is known


@dataclass(frozen=True, slots=True)
class Cut:
    """Tokens [start, stop) leave; what follows moves up. Empty when start == stop."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


NOTHING = Cut(0, 0)


def reserve_for(context: int, max_tokens: int | None) -> int:
    """Tokens of the context kept free for the reply: what is asked for, else REPLY_RESERVE; at most a quarter."""
    return max(1, min(REPLY_RESERVE if max_tokens is None else max_tokens, context // 4))


def prompt_limit(context: int, max_tokens: int | None) -> int:
    """Longest prompt that leaves room for the reply."""
    return max(1, context - reserve_for(context, max_tokens))


@dataclass(frozen=True, slots=True)
class Roll:
    """How a sequence goes on past a full context without computing again what stays.

    It may hold `pages` full pages. Before the token that would need one more, the page behind the first `sinks` pages
    leaves. So what token n of a sequence sees is a function of n alone, whoever else runs and however the tokens were
    cut into passes: the sinks, and the last tokens from `first_seen(n)` on. One page at a time keeps the most in
    sight, and costs one rotation of the sinks for page_size tokens.
    """

    pages: int
    sinks: int
    page_size: int

    @property
    def capacity(self) -> int:
        """Most tokens in sight."""
        return self.pages * self.page_size

    @property
    def kept(self) -> int:
        """First tokens that never leave."""
        return self.sinks * self.page_size

    def gone(self, page: int) -> int:
        """Pages that have left when the tokens of the sequence's page number `page` (from 0) are computed."""
        return max(0, page - self.pages + 1)

    def first_seen(self, token: int) -> int:
        """The first token behind the sinks that token number `token` of the sequence sees."""
        return self.kept + self.gone(token // self.page_size) * self.page_size

    def mark(self, parent: bytes) -> bytes:
        """The key behind `parent` for a page that is computed after something has left: what it holds depends on it."""
        return blake2b(b"rolled %d %d " % (self.pages, self.sinks) + parent, digest_size=16).digest()


def roll_for(context: int, keep: int, page_size: int) -> Roll | None:
    """How a context of `context` tokens rolls; None when it has too few pages for sinks and something recent.

    `keep` is rounded up to whole pages, at least one; it gives way when it would fill more than three eighths.
    """
    pages = context // page_size
    if pages < 3:
        return None
    return Roll(pages, max(1, min(-(-keep // page_size), pages * 3 // 8)), page_size)


def slack(context: int, page_size: int) -> int:
    """Tokens to drop at a time: a quarter of the context, in whole pages where it has some.

    What stays of a prompt that is cut is computed again (a sequence that grows past the context rolls instead, see
    `Roll`). Because the amounts are multiples of one number, a prompt that grows from turn to turn is cut at the same
    place for a while, and finds its beginning in the cache.
    """
    quarter = max(1, context // 4)
    return quarter - quarter % page_size if quarter >= page_size else quarter


def cut(length: int, *, limit: int, keep: int, step: int) -> Cut:
    """Which of `length` tokens leave so that at most `limit` stay: the oldest after the first `keep`.

    Rounded up to a multiple of `step` as long as tokens are there; `keep` gives way when it fills half the limit.
    """
    if length <= limit:
        return Cut(0, 0)
    keep = min(keep, limit // 2)
    amount = -(-(length - limit) // step) * step
    return Cut(keep, keep + min(amount, length - keep - 1))


def turns_to_drop(count: Callable[[int], int], turns: int, *, limit: int) -> int | None:
    """How many of the oldest `turns` droppable turns leave so that the rest fits; None when nothing helps.

    count(n) is the length in tokens without the n oldest turns; it must not grow with n. Once anything has to go,
    the rest is brought down to three quarters of `limit` if whole turns allow it: the next turns then fit
    without another cut, and the cache keeps serving their common beginning.
    """
    if count(0) <= limit:
        return 0
    for target in (limit - limit // 4, limit):
        low, high = 1, turns + 1  # the smallest n with count(n) <= target; turns + 1: there is none
        while low < high:
            middle = (low + high) // 2
            if count(middle) <= target:
                high = middle
            else:
                low = middle + 1
        if low <= turns:
            return low
    return None
