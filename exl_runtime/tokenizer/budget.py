"""The allowance of one template rendering: how big a value may get, how much may be done and made, how long it takes.

Values inside a sandboxed template cannot be changed once made, so checking every value where it is made keeps all
of them small; then no single operation can be long, and counting operations bounds the whole.
"""

import time
from collections.abc import ItemsView, KeysView, ValuesView
from sys import getsizeof
from typing import Any, TypeVar

T = TypeVar("T")

NODE = 16  # weight of anything that is not a character: an element, a number
MAX_HEIGHT = 100  # nesting of lists and mappings
MAX_INT_BITS = 4096
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


class LimitExceeded(Exception):
    """The template wants more than a chat template plausibly needs."""


class Budget:
    """Weights are in characters of text, NODE per element. A list that holds a list twice weighs it twice, as
    printing or comparing it would cost."""

    def __init__(self, *, value_limit: int, steps: int, memory: int, seconds: float) -> None:
        """value_limit: largest weight of one value; steps: loop turns, calls, filters and operators in all;
        memory: bytes of all values ever made; seconds: of processor time of this thread, so that a machine that is busy
        with something else, or asleep, refuses nothing."""
        self.value_limit = value_limit
        self._steps = steps
        self._memory = memory
        self._seconds = seconds
        self._deadline = time.thread_time() + seconds
        # id -> (value, weight, height); holding the value keeps its id from being used again
        self._known: dict[int, tuple[Any, int, int]] = {}

    @classmethod
    def for_input(cls, weight: int) -> "Budget":
        """An allowance that grows with the conversation: some real templates build its text by appending to a copy."""
        return cls(
            value_limit=2**22 + 4 * weight,
            steps=2**20 + 32 * weight,
            memory=2**28 + 2**11 * weight,
            seconds=3.0 + min(weight / 2**18, 27.0),
        )

    def tick(self) -> None:
        """Pay for one step."""
        self._steps -= 1
        if self._steps < 0:
            raise LimitExceeded("it takes too many steps")
        if not self._steps & 15 and time.thread_time() > self._deadline:  # asking takes as long as a step
            raise LimitExceeded(f"it takes longer than {self._seconds:.0f} s")

    def allocate(self, size: int) -> None:
        """Pay for `size` bytes."""
        self._memory -= size
        if self._memory < 0:
            raise LimitExceeded("it makes too much text")

    def require(self, weight: int) -> None:
        """Refuse a value that would weigh this much, before it is made."""
        if weight > self.value_limit:
            raise LimitExceeded(f"it makes a value of {weight} characters, the limit is {self.value_limit}")

    def admit(self, value: T) -> T:
        """Check a new value, pay for it and a step, and hand it on."""
        self.tick()
        if isinstance(value, str):
            self.require(len(value))
            self.allocate(getsizeof(value))
        elif value is not None and not isinstance(value, bool):
            self.require(self.weigh(value))
        return value

    def weigh(self, value: Any) -> int:
        """The weight of `value`; pays for the containers in it that were not seen before."""
        return self._measure(value, 0)[0]

    def _measure(self, value: Any, level: int) -> tuple[int, int]:
        if isinstance(value, str):
            return len(value), 0
        if isinstance(value, int):
            if value.bit_length() > MAX_INT_BITS:
                raise LimitExceeded(f"it makes a number of more than {MAX_INT_BITS} bits")
            return NODE, 0
        if isinstance(value, range):
            return NODE * (len(value) + 1), 1
        if not isinstance(value, _CONTAINERS):
            return NODE, 0
        known = self._known.get(id(value))
        if known is not None:
            return known[1], known[2]
        if level > MAX_HEIGHT:
            raise LimitExceeded(f"it nests values more than {MAX_HEIGHT} deep")
        weight, height, texts = NODE, 0, 0
        for item in value.items() if isinstance(value, dict) else value:
            # the pair of a mapping is a passing object, so it is looked into rather than remembered
            for part in item if isinstance(value, (dict, ItemsView)) else (item,):
                part_weight, part_height = self._measure(part, level + 1)
                weight += NODE + part_weight
                height = max(height, part_height)
                texts += getsizeof(part) if isinstance(part, str) else 0
        if height >= MAX_HEIGHT:
            raise LimitExceeded(f"it nests values more than {MAX_HEIGHT} deep")
        self.allocate(getsizeof(value) + texts)
        self._known[id(value)] = (value, weight, height + 1)
        return weight, height + 1
