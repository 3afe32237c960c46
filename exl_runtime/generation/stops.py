"""When a reply ends: by token ids and by strings. Pure functions of ids and text."""

from collections.abc import Iterable, Sequence
from typing import Literal


class StopIds:
    """Which token ids end a reply, and why: the model's own end-of-sequence ids, and those a request adds."""

    __slots__ = ("_reasons", "ids")

    def __init__(self, eos_ids: Iterable[int], stop_ids: Iterable[int] = ()) -> None:
        self._reasons: dict[int, Literal["eos", "stop"]] = dict.fromkeys(stop_ids, "stop") | dict.fromkeys(
            eos_ids, "eos"
        )
        self.ids = tuple(self._reasons)

    def reason(self, token: int) -> Literal["eos", "stop"] | None:
        """Why `token` ends the reply; None if it does not."""
        return self._reasons.get(token)


def find_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that is completed first in `text`; of two completed together, the longer."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    if not found:
        return None
    end, start = min(found)
    return start, end


def is_loop(ids: Sequence[int], longest: int, times: int) -> bool:
    """True when the last 1 to `longest` ids have come `times` times in a row."""
    for period in range(1, min(longest, len(ids) // times) + 1):
        if ids[-1] != ids[-1 - period]:
            continue
        tail = ids[-period * times :]
        if tail[period:] == tail[:-period]:
            return True
    return False


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string could still begin."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
