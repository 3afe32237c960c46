"""EXL2 matrices on the CPU: codes and 4-bit scales stay packed, the native kernel decodes them in registers."""

from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from ...formats.base import QuantFormat
from ...formats.exl2 import Exl2
from .. import native
from .base import LinearKernel
from .tiles import STEP, TILE, CodeTiles, Run, flat_float, like_input, native_refusal, row_table, span_table


class Exl2Cpu(LinearKernel):
    """See the base class and ext/cpu/linear.h. Holds 4-bit codes in 4 bits: about the size on disk."""

    backend: ClassVar[str] = "cpu"

    @classmethod
    def refuses(cls, w: QuantFormat, device: torch.device) -> str | None:
        """See the base class."""
        if not isinstance(w, Exl2):
            return f"takes exl2 weights, not {w.name}"
        return native_refusal(device)

    def __init__(self, w: QuantFormat, device: torch.device) -> None:
        assert isinstance(w, Exl2)
        self.shape = w.shape
        outputs = w.shape.out_features
        runs = [Run(group.bits, index, group.rows) for index, group in enumerate(w.groups)]
        perm = torch.arange(w.shape.in_features) if w.perm is None else w.perm.cpu()
        self._spans, self._rows = span_table(runs), row_table(perm, runs)

        q_weight = w.q_weight.cpu()
        tiles = CodeTiles(outputs, sum(TILE * run.bits * 2 * (run.positions // STEP) for run in runs))
        for bits, groups in groupby(w.groups, key=lambda group: group.bits):
            region = list(groups)
            first, last = region[0], region[-1]
            tiles.append(q_weight[first.first_word_row : last.first_word_row + last.word_rows], bits)
        self._codes = tiles.buffer

        # A tile's four nibbles of a group lie in one int16: nibble n % 8 of word n // 8 is column n already.
        halves = w.q_scale.cpu().view(torch.int16)  # (G, Np / 4)
        self._scales = halves[:, : -(-outputs // TILE)].t().contiguous()
        maxima = w.group_scales().cpu().float().repeat_interleave(TILE)
        self._maxima = torch.cat([maxima, maxima.new_zeros(3 * TILE)])  # the kernel loads four groups at a time

    def __call__(self, x: Tensor) -> Tensor:
        """See the base class."""
        y = native.ops().linear_exl2(
            flat_float(x), self._codes, self._scales, self._maxima, self._spans, self._rows, self.shape.out_features
        )
        return like_input(y, x)

    @property
    def storage_bytes(self) -> int:
        """See the base class."""
        held = (self._codes, self._scales, self._maxima, self._spans, self._rows)
        return sum(tensor.nbytes for tensor in held)
