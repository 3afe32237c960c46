"""What a kernel that repacks its matrix is told about the result, and the memory that packing a model needs."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...memory import Arena, Scratch, empty_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The result of one packing.

    take          bytes -> the buffer the result lies in
    outputs       int32 (N,): the column of the matrix that becomes output n; None: columns in order
    sort_inputs   take the inputs in the order of the packed rows, where that is a mere permutation of the matrix's own;
                  the kernel's `input_order` then says which. Whoever makes the inputs has to order them.
    """

    take: Callable[[int], Tensor] = empty_bytes
    outputs: Tensor | None = None
    sort_inputs: bool = False


class Workshop:
    """The memory of one load: what stays lies back to back, and what is only packed goes through one buffer.

    expected  bytes that will stay, roughly
    """

    def __init__(self, expected: int) -> None:
        self.keep: Callable[[int], Tensor] = Arena(expected).take
        self.lend: Callable[[int], Tensor] = Scratch().lend
