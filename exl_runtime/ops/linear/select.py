"""The list of kernels, and the choice among them. Knows no kernel's insides."""

import torch

from ...errors import BackendUnavailable
from ...formats.base import QuantFormat
from .base import LinearKernel
from .dense_cpu import DenseCpu
from .exl2_cpu import Exl2Cpu
from .gptq_cpu import GptqCpu
from .packing import Packing
from .reference import Reference

# Best first; the first that does not refuse is taken. Native kernels stand before Reference.
KERNELS: tuple[type[LinearKernel], ...] = (Exl2Cpu, GptqCpu, DenseCpu, Reference)


def select(
    w: QuantFormat, device: torch.device, backend: str | None = None, packing: Packing | None = None
) -> LinearKernel:
    """Build the best kernel for `w` on `device`; `backend` limits the choice to one backend.

    packing  for kernels that repack; an order of outputs needs one of those.
    Raises BackendUnavailable listing every kernel considered and its reason.
    """
    refusals = []
    for kernel in KERNELS:
        if backend not in (None, kernel.backend):
            continue
        if (why := kernel.refuses(w, device)) is None:
            if kernel.repacks and packing is not None:
                return kernel(w, device, packing=packing)
            assert packing is None or packing.outputs is None, f"{kernel.__name__} keeps columns in order"
            return kernel(w, device)
        refusals.append(f"{kernel.__name__}: {why}")
    if not refusals:
        known = ", ".join(dict.fromkeys(kernel.backend for kernel in KERNELS))
        refusals.append(f"no kernel belongs to backend {backend!r}; there are {known}")
    wanted = "" if backend is None else f" with backend {backend!r}"
    raise BackendUnavailable(f"no kernel for {w.name} on {device}{wanted}\n  " + "\n  ".join(refusals))
