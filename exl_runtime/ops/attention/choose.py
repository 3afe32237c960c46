"""Which code does the attention of a model on CUDA, and why: data for the program and for the person who asks.

Decoding is always done by our own kernel; every prefill gives the same result within `PREFILL_BOUND`.
"""

import importlib.util
import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..kv_quant import bits_of

logger = logging.getLogger(__name__)

DECODE_ROWS = 16  # kDecodeRows in ext/cuda/attention.h: new tokens of a sequence up to which it counts as decoding
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)  # attention_head_dim in ext/cuda/attention_decode.cu
FLASH_PAGE = 256  # flash-attn reads pages of multiples of this
FLASH_CAPABILITY = (8, 0)

# Two prefills differ by at most this, relative to the largest value in sight: weights, values and results are halves
# in each, one rounding (2^-11) apiece.
PREFILL_BOUND = 6 * 2.0**-11


@dataclass(frozen=True, slots=True)
class Choice:
    """name: "flash" | "sdpa" | "own" | "reference"; reason: in words for the user."""

    name: str
    reason: str


def refusal(head_dim: int, pages: Tensor) -> str | None:
    """None if the CUDA kernels take heads of `head_dim` over `pages` (P, page_size, kv_heads, row), else why not."""
    if head_dim not in HEAD_DIMS:
        return f"the kernels take heads of {', '.join(map(str, HEAD_DIMS))} values, not of {head_dim}"
    if pages.dtype not in (torch.float16, torch.bfloat16, torch.uint8):
        return f"the kernels take a cache of fp16, bf16 or codes, not of {pages.dtype}"
    size = pages.shape[1]
    if size < 16 or size & (size - 1):
        return f"the kernels take pages of a power of two of tokens, at least 16, not of {size}"
    return None


def choose_decode(head_dim: int, pages: Tensor) -> Choice:
    """What attends for sequences of up to DECODE_ROWS new tokens."""
    why = refusal(head_dim, pages)
    if why is not None:
        return Choice("reference", why)
    if pages.dtype == torch.uint8:
        return Choice("own", f"reads {bits_of(pages, head_dim)}-bit keys as they are stored")
    return Choice("own", "split over the context")


def choose_prefill(
    device: torch.device, *, head_dim: int, pages: Tensor, window: int | None, softcap: float | None
) -> Choice:
    """What attends for longer runs of new tokens. Logged when it is chosen for the first time."""
    choice = _prefill(device, head_dim, pages, window, softcap)
    _log_once(choice)
    return choice


def _prefill(device: torch.device, head_dim: int, pages: Tensor, window: int | None, softcap: float | None) -> Choice:
    why = refusal(head_dim, pages)
    if why is not None:
        return Choice("reference", why)
    if device.type != "cuda":
        return Choice("own", "emulated")
    if pages.dtype == torch.uint8:
        return Choice("own", "reads codes as they are stored, others would want them expanded over the context")
    missing = _flash_missing(device)
    if missing is None and pages.dtype == torch.float16:
        through = "pages" if pages.shape[1] % FLASH_PAGE == 0 else "gathered keys"
        return Choice("flash", f"flash-attn is installed; over {through}")
    missing = missing or "flash-attn would narrow queries to bfloat16"
    if softcap is not None:
        return Choice("own", f"{missing}; torch has no softcap")
    if window is not None:
        return Choice("own", f"{missing}; torch would write the mask of a window out")
    return Choice("sdpa", f"{missing}; torch's own over gathered keys")


def describe(
    device: torch.device, *, head_dim: int, pages: Tensor, window: int | None = None, softcap: float | None = None
) -> dict[str, Choice]:
    """For reports: "decode" and "prefill" of a layer with these pages (an empty tensor of their shape will do)."""
    return {
        "decode": choose_decode(head_dim, pages),
        "prefill": _prefill(device, head_dim, pages, window, softcap),
    }


@cache
def _flash_missing(device: torch.device) -> str | None:
    """None if flash-attn 2 can run on the device, else why not."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if torch.cuda.get_device_capability(device) < FLASH_CAPABILITY:
        return "flash-attn needs an Ampere card or a newer one"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as err:  # a wheel for another torch fails in many ways
        return f"flash-attn does not load ({err.__class__.__name__}: {err})"
    return None


@cache
def _log_once(choice: Choice) -> None:
    logger.info("attention of prompts: %s (%s)", choice.name, choice.reason)
