"""The allowance of one template rendering: how big a value may get, how much may be done, how long it may take.

Values inside a sandboxed template cannot be changed once made, so checking every value where it is made keeps all
of them small; then no single operation can be long, and counting operations bounds the whole.
"""

import time
from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any, TypeVar

T = TypeVar("T")

NODE = 16  # weight of anything that is not a character: an element, a number
TICK = 32  # price of one step (a loop turn, a call, a filter, an operator)
MAX_HEIGHT = 100  # nesting of lists and mappings
MAX_INT_BITS = 4096
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


class LimitExceeded(Exception):
    """The template wants more than a chat template plausibly needs."""


class Budget:
    """Weights are in characters of text, NODE per element. A list that holds a list twice weighs it twice, as
    printing or comparing it would cost."""

    def __init__(self, *, value_limit: int, fuel: int, seconds: float) -> None:
        """value_limit: largest weight of one value; fuel: sum of all steps and new values; seconds: of wall time."""
        self.value_limit = value_limit
        self._fuel = fuel
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds
        # id -> (value, weight, height); holding the value keeps its id from being used again
        self._known: dict[int, tuple[Any, int, int]] = {}

    @classmethod
    def for_input(cls, weight: int) -> "Budget":
        """An allowance that grows with the conversation: real templates read a message a few dozen times."""
        return cls(
            value_limit=2**22 + 4 * weight, fuel=2**25 + 128 * weight, seconds=3.0 + min(weight, 2**25) / 2**20
        )

    def tick(self) -> None:
        self.charge(TICK)

    def charge(self, cost: int) -> None:
        self._fuel -= cost
        if self._fuel < 0:
            raise LimitExceeded("it takes too many steps or makes too much text")
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"it takes longer than {self._seconds:.0f} s")

    def require(self, weight: int) -> None:
        """Refuse a value that would weigh this much, before it is made."""
        if weight > self.value_limit:
            raise LimitExceeded(f"it makes a value of about {weight} characters, the limit is {self.value_limit}")

    def admit(self, value: T) -> T:
        """Check a new value, pay for it and a step, and hand it on."""
        kind = type(value)
        if kind is str:
            self.require(len(value))
            self.charge(TICK + len(value))
        elif value is None or kind is bool:
            self.tick()
        else:
            self.require(self.weigh(value))
            self.charge(TICK + (len(value) if isinstance(value, (str, *_CONTAINERS)) else NODE))
        return value

    def weigh(self, value: Any) -> int:
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
        weight, height = NODE, 0
        items = value.items() if isinstance(value, dict) else value
        for item in items:
            # a pair of a mapping is not kept, so it is looked into rather than remembered
            parts = item if isinstance(value, (dict, ItemsView)) else (item,)
            for part in parts:
                inner_weight, inner_height = self._measure(part, level + 1)
                weight += NODE + inner_weight
                height = max(height, inner_height)
        if height >= MAX_HEIGHT:
            raise LimitExceeded(f"it nests values more than {MAX_HEIGHT} deep")
        self._known[id(value)] = (value, weight, height + 1)
        return weight, height + 1
