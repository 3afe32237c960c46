"""Random quantized matrices under their on-disk suffixes, for tests of formats and kernels."""

import torch
from torch import Tensor

from exl_runtime.formats.base import QuantFormat
from exl_runtime.formats.bits import pack_columns, pack_rows
from exl_runtime.formats.exl2 import Exl2
from exl_runtime.formats.gptq import Gptq


def exl2_tensors(
    layout: list[tuple[int, int]], outputs: int, *, seed: int = 0, permuted: bool = True
) -> dict[str, Tensor]:
    """A valid EXL2 matrix: `layout` is (bits, rows) of every group; columns are padded to a multiple of 32."""
    random = torch.Generator().manual_seed(seed)
    padded = -(-outputs // 32) * 32
    words, table, first = [], [], 0
    for bits, rows in layout:
        codes = torch.randint(0, 1 << bits, (rows, padded), generator=random)
        codes[:, outputs:] = 1 << (bits - 1)
        words.append(pack_rows(codes, bits))
        table += [bits, first]
        first += words[-1].shape[0]
    nibbles = torch.randint(0, 16, (len(layout), padded), generator=random)
    nibbles[:, outputs:] = 15
    tensors = {
        "q_weight": torch.cat(words),
        "q_scale": pack_columns(nibbles, 4),
        "q_scale_max": (torch.rand(len(layout), generator=random) * 0.02 + 0.001).half(),
        "q_groups": torch.tensor(table).to(torch.int16),
    }
    if permuted:
        tensors["q_invperm"] = torch.randperm(sum(rows for _, rows in layout), generator=random).to(torch.int32)
    return tensors


def gptq_tensors(
    bits: int, inputs: int, outputs: int, group_size: int, *, seed: int = 0, act_order: bool = False
) -> dict[str, Tensor]:
    """A valid GPTQ matrix with random zero-points; group_size -1 is one group."""
    random = torch.Generator().manual_seed(seed)
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    index = torch.arange(inputs) // size
    if act_order:
        index = index[torch.randperm(inputs, generator=random)]
    return {
        "qweight": pack_rows(torch.randint(0, 1 << bits, (inputs, outputs), generator=random), bits),
        "qzeros": pack_columns(torch.randint(0, 1 << bits, (groups, outputs), generator=random), bits),
        "scales": (torch.rand(groups, outputs, generator=random) * 0.02 + 0.001).half(),
        "g_idx": index.to(torch.int32),
    }


def dense_tensors(inputs: int, outputs: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> dict[str, Tensor]:
    """A dense matrix."""
    return {"weight": torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)}


def unrounded(w: QuantFormat, rounded: Tensor | None = None) -> Tensor:
    """float64 (K, N): (code - zero) * scale without the rounding to half of `dequantize`, from which it is computed."""
    rounded = (w.dequantize() if rounded is None else rounded).double()
    if isinstance(w, Exl2):
        stored = torch.repeat_interleave(torch.tensor([group.rows for group in w.groups]))
        groups = torch.empty_like(stored)
        groups[stored.new_tensor(range(len(stored))) if w.perm is None else w.perm.long()] = stored
        scales = w.scales()[groups, : rounded.shape[1]].double()
    else:
        assert isinstance(w, Gptq)
        scales = w.scales[w.row_group.long()].double()
    return torch.where(scales == 0, 0.0, (rounded / scales).round() * scales)
