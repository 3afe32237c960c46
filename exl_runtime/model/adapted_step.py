"""Adapters inside the native pass of a model on the CPU, where all that they add are thin matrices.

Rescaled outputs (DoRA), whole matrices, embeddings, biases, routers and experts run operator by operator.
"""

from weakref import WeakKeyDictionary

from ..config.names import LINEARS
from ..ops.linear.dense_cpu import DenseCpu
from ..ops.step import AdapterChange, Program
from .batch import Plan
from .lora import HEAD, Adapter, Change, Place
from .transformer import Transformer


class NativeAdapters:
    """Tells the native pass of `model` which adapters it has; it learns of each when it is first used."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._program: Program | None = None
        self._numbers: WeakKeyDictionary[Adapter, int | None] = WeakKeyDictionary()

    def share(self, plan: Plan) -> bool:
        """Whether the model can run `plan` with its mixes. If so its next native pass has them: it must be this one."""
        step = self._model.step
        if step is None:
            return False
        if step.program is not self._program:  # a part of the model was replaced
            self._program = step.program
            self._numbers.clear()
        adapters = sorted({adapter for mix in plan.mixes for adapter, _ in mix}, key=lambda adapter: adapter.digest)
        numbers = [number for adapter in adapters if (number := self._number(adapter)) is not None]
        if len(numbers) < len(adapters):
            return False
        weights = [dict(mix).get(adapter, 0.0) for adapter in adapters for mix in plan.mixes]
        self._program.share(numbers, weights)
        return True

    def forget(self) -> None:
        """After a pass that perhaps did not begin."""
        if self._program is not None:
            self._program.share((), ())

    def _number(self, adapter: Adapter) -> int | None:
        if adapter not in self._numbers:
            changes = _changes(adapter, len(self._model.blocks))
            assert self._program is not None
            self._numbers[adapter] = None if changes is None else self._program.adapter(changes, adapter)
        return self._numbers[adapter]


def _changes(adapter: Adapter, layers: int) -> list[AdapterChange] | None:
    """None if the native pass cannot have this adapter."""
    if adapter.table:
        return None
    found = []
    for place, changes in adapter.changes.items():
        for change in changes:
            native = _native(place, change, layers)
            if native is None:
                return None
            found.append(native)
    return found


def _native(place: Place, change: Change, layers: int) -> AdapterChange | None:
    block, part = place
    if place != HEAD and part not in LINEARS:
        return None
    if change.shift is not None or change.stretch is not None or change.whole is not None:
        return None
    if not isinstance(change.down, DenseCpu) or not isinstance(change.up, DenseCpu):
        return None
    number = 7 * layers if place == HEAD else 7 * block + LINEARS.index(part)
    return AdapterChange(number, change.down.weight, change.up.weight, change.scale)
