"""Paged attention by the CUDA kernels (ext/cuda/attention.h), or for long prompts by what `choose` finds better.

Nothing here reads a number from the device unless the chosen prefill does, so a decoding step fits a CUDA graph.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..native import cuda_ops
from . import flash, reference, sdpa
from .choose import DECODE_ROWS, choose_prefill, refusal

# Prefill over everything; the rows of short sequences are computed again by the decode kernel afterwards, so that they
# do not depend on what else is in the batch.
PREFILL = {"flash": flash.prefill, "sdpa": sdpa.prefill}


@dataclass(slots=True)
class _Workspace:
    """Memory of the decode kernel on one device. Recorded graphs point into it, outgrown parts included, and hold it.

    One stream at a time may use it; torch's default is one stream.
    """

    partial: Tensor
    tickets: Tensor
    outgrown: list[Tensor] = field(default_factory=list)
    needs: dict[tuple[int | None, ...], tuple[int, int]] = field(default_factory=dict)


_workspaces: dict[torch.device, _Workspace] = {}


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_starts: Tensor,
    kv_lengths: Tensor,
    pages: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Arguments as in `base.PagedAttention`; products of halves, float32 sums.

    A sequence of up to DECODE_ROWS rows gives the same bits in any batch and with any split of those rows, within one
    band of lengths (`decode_chunk` in ext/cuda/attention.h). What the kernels do not take (`choose.refusal`) runs in
    plain torch.
    """
    if refusal(q.shape[-1], k_pages) is not None:
        return reference.paged_attention(q, k_pages, v_pages, q_starts, kv_lengths, pages, scale, window, softcap)
    if q.dtype != torch.float16:
        return paged_attention(q.half(), k_pages, v_pages, q_starts, kv_lengths, pages, scale, window, softcap).to(
            q.dtype
        )
    q = q if q.is_contiguous() else q.contiguous()
    tokens, sequences = q.shape[0], pages.shape[0]
    # Without a look at the device: has any sequence more rows than the decode kernel takes, has any as few?
    long, short = tokens > DECODE_ROWS, tokens <= DECODE_ROWS or sequences > 1
    name = "own"
    if long:
        name = choose_prefill(q.device, head_dim=q.shape[-1], pages=k_pages, window=window, softcap=softcap).name
    if name == "own":
        out = torch.empty_like(q)
    else:
        out = PREFILL[name](q, k_pages, v_pages, q_starts, kv_lengths, pages, scale, window, softcap)
    run(q, k_pages, v_pages, q_starts, kv_lengths, pages, scale, window, softcap, out, short, long and name == "own")
    return out


def run(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_starts: Tensor,
    kv_lengths: Tensor,
    pages: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,
    decode: bool,
    prefill: bool,
) -> None:
    """The kernels themselves, into `out` float16 (T, heads, head_dim).

    decode   for the sequences of 1 to DECODE_ROWS rows; the rows of others stay as they are
    prefill  for the longer ones
    """
    space = _workspace(q, k_pages, pages, window)
    cuda_ops(q.device).paged_attention(
        q,
        k_pages,
        v_pages,
        q_starts,
        kv_lengths,
        pages,
        scale,
        window,
        softcap,
        space.partial,
        space.tickets,
        out,
        decode,
        prefill,
    )


def workspace_on(device: torch.device) -> object:
    """What a recorded pass has to keep alive."""
    device = _numbered(device)
    return _workspaces.get(device) or _grow(device, 0, 0)


def release(device: torch.device) -> None:
    """Let go of the memory on `device`; the next call makes it anew. What a recording holds stays until it is gone."""
    _workspaces.pop(_numbered(device), None)


def _numbered(device: torch.device) -> torch.device:
    """As tensors name it: cuda:0, not cuda."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _workspace(q: Tensor, k_pages: Tensor, pages: Tensor, window: int | None) -> _Workspace:
    """Memory for these shapes."""
    space = _workspaces.get(q.device) or _grow(q.device, 0, 0)
    key = (*q.shape, *k_pages.shape[1:3], *pages.shape, window)
    need = space.needs.get(key)
    if need is None:
        if len(space.needs) > 1000:
            space.needs.clear()
        need = space.needs[key] = tuple(cuda_ops(q.device).decode_workspace(q, k_pages, pages, window))
    if need[0] > space.partial.numel() or need[1] > space.tickets.numel():
        _grow(q.device, *need)
    return space


@torch.inference_mode(False)  # tensors made in that mode could not be written outside of it
def _grow(device: torch.device, floats: int, tickets: int) -> _Workspace:
    """By leaps, so that few sizes are ever outgrown."""
    space = _workspaces.get(device)
    if space is None:
        empty = torch.empty(0, dtype=torch.float32, device=device)
        space = _workspaces[device] = _Workspace(empty, torch.zeros(0, dtype=torch.int32, device=device))
    if floats > space.partial.numel():
        space.outgrown.append(space.partial)
        space.partial = torch.empty(_leap(floats), dtype=torch.float32, device=device)
    if tickets > space.tickets.numel():
        space.outgrown.append(space.tickets)
        space.tickets = torch.zeros(_leap(tickets), dtype=torch.int32, device=device)
    return space


def _leap(count: int) -> int:
    return max(1024, 1 << (count - 1).bit_length())
