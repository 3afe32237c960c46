"""Which experts a token visits, and with what weight. Knows no experts."""

import torch
from torch import Tensor


def route(logits: Tensor, experts_per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, then the best `experts_per_token`.

    logits     (T, E), any float dtype
    normalize  divide the kept weights by their sum
    Returns (weights float32 (T, k), experts int64 (T, k)), best first. Equal weights: the lower index first, so that
    the choice never depends on the sorting network of a device.
    """
    weights, experts = torch.softmax(logits.float(), dim=-1).sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :experts_per_token], experts[:, :experts_per_token]
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts
