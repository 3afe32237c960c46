"""Who does the attention of a model on CUDA, and why, in lines for people."""

import torch
from torch import Tensor

from ..cache.geometry import PAGE_SIZE
from ..cache.types import CacheType
from ..config.spec import ModelSpec
from ..ops.attention.choose import Choice, describe

NAMES = {
    "own": "our own kernel",
    "flash": "flash-attn",
    "sdpa": "torch's scaled_dot_product_attention",
    "reference": "plain torch, slowly",
}


def attention_choices(spec: ModelSpec, pages: Tensor, device: torch.device) -> list[tuple[str, Choice]]:
    """("decode" or "prefill", choice), each that some layer has, once; pages: see `choose.describe`."""
    windows = dict.fromkeys(layer.window for layer in spec.layers)
    softcap = spec.attention_softcap
    each = [describe(device, head_dim=spec.head_dim, pages=pages, window=one, softcap=softcap) for one in windows]
    return list(dict.fromkeys((phase, choices[phase]) for phase in ("decode", "prefill") for choices in each))


def attention_lines(spec: ModelSpec, pages: Tensor, device: torch.device) -> tuple[str, ...]:
    """ "decoding: our own kernel (split over the context)", and the same of prompts."""
    what = {"decode": "decoding", "prefill": "prompts"}
    choices = attention_choices(spec, pages, device)
    return tuple(f"{what[phase]}: {NAMES[choice.name]} ({choice.reason})" for phase, choice in choices)


def pages_like(spec: ModelSpec, cache: CacheType) -> Tensor:
    """No pages of keys, in the shape that a cache of this type has."""
    return torch.empty(0, PAGE_SIZE, spec.kv_heads, cache.row_lengths(spec.head_dim)[0], dtype=cache.dtype)
