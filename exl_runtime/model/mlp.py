"""The gated MLP of a dense layer, and of one expert."""

from torch import Tensor

from ..ops.table import OpSet
from .linear import Linear, project


class Mlp:
    """down(act(gate(x)) * up(x)); x (T, hidden) -> (T, hidden).

    inner_order  int32 (inner,): what lies at place i between the matrices is feature inner_order[i] of the checkpoint,
                 in the outputs (and biases) of gate and up as in the inputs of down; None: the checkpoint's order.
                 Whatever is added to a gate or up output, or taken from a down input, has to be ordered alike.
    """

    def __init__(
        self,
        *,
        gate: Linear,
        up: Linear,
        down: Linear,
        activation: str,
        ops: OpSet,
        inner_order: Tensor | None = None,
    ) -> None:
        self.inner_order = inner_order
        self.gate = gate
        self.up = up
        self.down = down
        self.activation = activation
        self._gated = ops.gated

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = project((self.gate, self.up), x)
        return self.down(self._gated(gate, up, self.activation))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer inside."""
        return (self.gate, self.up, self.down)
