"""Quantized matrices for tests of the CUDA kernels, their exact weights, and error bounds from arithmetic."""

import torch
from matrices import exl2_tensors, gptq_tensors
from torch import Tensor

from exl_runtime.formats import FormatHints, LinearShape, load_linear
from exl_runtime.formats.base import QuantFormat
from exl_runtime.formats.exl2 import Exl2
from exl_runtime.formats.gptq import Gptq
from exl_runtime.ops.linear import select
from exl_runtime.ops.linear.packed_cuda import PackedCuda

EVERY_WIDTH = [(8, 32), (6, 64), (5, 32), (4, 96), (3, 64), (2, 32)]  # K = 320


def random(*shape: int, seed: int = 0) -> Tensor:
    """float32, normal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halves(*shape: int, seed: int = 0) -> Tensor:
    """float16, normal."""
    return random(*shape, seed=seed).half()


def exl2(layout: list[tuple[int, int]], outputs: int, permuted: bool = True, seed: int = 0) -> Exl2:
    """Random weights; `layout` is (bits, rows) of every group."""
    shape = LinearShape(sum(rows for _, rows in layout), outputs)
    return load_linear(exl2_tensors(layout, outputs, permuted=permuted, seed=seed), shape, where="m")


def gptq(bits: int, inputs: int, outputs: int, group_size: int, act_order: bool, version: int = 1) -> Gptq:
    """Random weights and zero-points."""
    tensors = gptq_tensors(bits, inputs, outputs, group_size, act_order=act_order)
    declared = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": False}
    declared["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return load_linear(tensors, LinearShape(inputs, outputs), where="m", hints=FormatHints.from_json(declared))


def symmetric(bits: int, inputs: int, outputs: int, group_size: int) -> Gptq:
    """The same with all zero-points in the middle."""
    w = gptq(bits, inputs, outputs, group_size, act_order=False)
    w.zeros.fill_(1 << (bits - 1))
    return w


MATRICES = {
    "exl2 every width": lambda: exl2(EVERY_WIDTH, 96),
    "exl2 odd columns": lambda: exl2([(6, 128), (4, 256), (3, 64), (2, 192)], 33),
    "exl2 in order, many columns": lambda: exl2([(4, 64), (4, 32)], 288, permuted=False),
    "exl2 many small groups": lambda: exl2([(4, 32)] * 19, 40),
    "exl2 long": lambda: exl2([(5, 512), (4, 960), (3, 544)], 40),
    "exl2 K = 32": lambda: exl2([(6, 32)], 32),
    "exl2 one column": lambda: exl2([(3, 160), (2, 32)], 1),
    "gptq 2 bit": lambda: gptq(2, 640, 96, 128, act_order=True),
    "gptq 3 bit": lambda: gptq(3, 640, 32, 64, act_order=False, version=2),
    "gptq 3 bit, odd groups": lambda: gptq(3, 96, 32, 20, act_order=True),
    "gptq 4 bit": lambda: gptq(4, 640, 160, 32, act_order=False),
    "gptq 4 bit, groups of 40, order": lambda: gptq(4, 640, 96, 40, act_order=True),
    "gptq 4 bit, rows not whole units": lambda: gptq(4, 40, 40, 8, act_order=False),
    "gptq 4 bit, symmetric": lambda: symmetric(4, 1536, 24, 128),
    "gptq 8 bit, one group": lambda: gptq(8, 1056, 32, -1, act_order=True),
    "gptq 8 bit, symmetric": lambda: symmetric(8, 256, 32, 32),
}


def packed(w: QuantFormat, device: torch.device) -> PackedCuda:
    """The CUDA kernel for `w`."""
    kernel = select.select(w, device, "cuda")
    assert isinstance(kernel, PackedCuda)
    return kernel


def unrounded(w: QuantFormat) -> Tensor:
    """float64 (K, N): (code - zero) * scale without the rounding to half of `dequantize`, from which it is computed."""
    rounded = w.dequantize().double()
    if isinstance(w, Exl2):
        stored = torch.repeat_interleave(torch.tensor([group.rows for group in w.groups]))
        groups = torch.empty_like(stored)
        groups[torch.arange(len(stored)) if w.perm is None else w.perm.long()] = stored
        scales = w.scales()[groups, : rounded.shape[1]].double()
    else:
        assert isinstance(w, Gptq)
        scales = w.scales[w.row_group.long()].double()
    return torch.where(scales == 0, 0.0, (rounded / scales).round() * scales)


def assert_sums(actual: Tensor, x: Tensor, weight: Tensor, inputs: float = 0.0) -> None:
    """float32 `actual` is x @ weight but for rounding; x and weight as the kernel takes them, weight float64.

    Products of halves and codes are exact in float32; each of at most K / 8 + 64 additions and scalings is off by at
    most 2^-22 of what has been summed so far (tensor cores do not round to nearest). `inputs`: relative error of x.
    """
    actual, x = actual.cpu(), x.cpu().double()
    assert actual.dtype == torch.float32 and actual.shape == (x.shape[0], weight.shape[1])
    relative = (weight.shape[0] / 8 + 64) * 2.0**-22 + inputs
    bound = relative * (x.abs() @ weight.abs()) + 1e-30
    error = (actual.double() - x @ weight).abs()
    assert (error <= bound).all(), f"error {float((error / bound).max()):.3g} times the bound"  # NaN fails too
