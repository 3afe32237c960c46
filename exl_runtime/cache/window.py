"""What leaves when a context overflows. Arithmetic on lengths only: no tokens, no pages, no messages."""

from collections.abc import Callable
from dataclasses import dataclass

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


def reserve_for(context: int, max_tokens: int | None) -> int:
    """Tokens of the context kept free for the reply: what is asked for, else REPLY_RESERVE; at most a quarter."""
    return max(1, min(REPLY_RESERVE if max_tokens is None else max_tokens, context // 4))


def prompt_limit(context: int, max_tokens: int | None) -> int:
    """Longest prompt that leaves room for the reply."""
    return max(1, context - reserve_for(context, max_tokens))


def slack(context: int, page_size: int) -> int:
    """Tokens to drop at a time: a quarter of the context, in whole pages where it has some.

    What stays gets new positions and is computed again, so dropping just enough would do that at every token. And
    because the amounts are multiples of one number, a prompt that grows from turn to turn is cut at the same place
    for a while, and finds its beginning in the cache.
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
