"""What is known of the pass behind the one at hand, before its tokens are: enough to begin it while they are delivered.

Whoever begins it must not count on its being wanted: a stop string, a guess or a newcomer makes the next step another
one. It writes no keys and values but those of the tokens that are drawn now, behind all that anybody reads.
"""

from collections.abc import Sequence as Many

from ..model.step import NO_MORE, Onward
from .request import RequestState
from .scheduler import Chunk


def onward(chunks: Many[Chunk], *, page_size: int, context: int) -> Onward:
    """One more token of every sequence, drawn natively as all of these are; NO_MORE where one of them needs a page,
    ends, or has to let old tokens go. `context`: most tokens of one sequence."""
    draws: list[float] = []
    banned: list[int] = []
    ends: tuple[int, ...] = ()
    for chunk in chunks:
        sequence = chunk.sequence
        place = len(sequence.generated) + 1
        if sequence.state is not RequestState.DECODE or chunk.draft or sequence.room or place >= sequence.limit:
            return NO_MORE
        if any(chunk.stop >= len(pages) * page_size for pages in sequence.tables):
            return NO_MORE
        if sequence.roll is None and len(sequence.tokens) + 1 >= context:
            return NO_MORE
        how = sequence.sampler.by_kernel(place)
        if how is None:
            return NO_MORE
        draws += how[:3]
        banned += (len(how[3]), *how[3])
        if sequence.stop_ids.ids != ends:
            ends += sequence.stop_ids.ids
    return Onward(draws, banned, ends)
