"""Drawing a token from the logits of one position, natively where the kernels are loaded, else in plain torch.

Definition of `sample_min_p`, in float64, with m the largest logit:

    w_i = exp((logits_i - m) / temperature)          the probability of i in units of the largest
    kept: w_i >= max(min_p, 1e-18)                   so that tokens at the rounding noise of a sum are never drawn
    token: the first kept i, in index order, with    sum of kept w_j, j <= i   >   u * (sum of all kept w_j)

Native and reference agree but for sums that differ in their last bit. Knows no sampling settings beyond these.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import NonFiniteError
from . import native

FLOOR = 1e-18


def argmax(logits: Tensor, banned: Sequence[int] = ()) -> int:
    """The index of the largest of float32 (vocab,), the lowest among equals.

    banned  ids of tokens that are not allowed, ascending, each once
    Raises NonFiniteError when they hold a NaN or +infinity, or nothing but -infinity ("not allowed").
    """
    if _native(logits):
        token = native.ops().draw(logits, 0.0, 0.0, 0.0, banned) if banned else native.ops().best(logits)
    else:
        token = argmax_reference(_without(logits, banned))
    return _checked(token, logits)


def sample_min_p(logits: Tensor, *, temperature: float, min_p: float, u: float, banned: Sequence[int] = ()) -> int:
    """A token of softmax(logits / temperature) restricted to p >= min_p * max(p): the one at quantile `u`.

    logits       float32 (vocab,); -infinity is "not allowed"
    temperature  > 0
    min_p        0 to 1; 0 keeps all
    u            0 <= u < 1; uniform random numbers give the restricted distribution exactly
    banned       as for `argmax`; they have no share in the distribution
    Raises NonFiniteError as `argmax` does.
    """
    if _native(logits):
        token = (
            native.ops().draw(logits, temperature, min_p, u, banned)
            if banned
            else native.ops().sample_min_p(logits, temperature, min_p, u)
        )
    else:
        token = sample_min_p_reference(_without(logits, banned), temperature=temperature, min_p=min_p, u=u)
    return _checked(token, logits)


def argmax_reference(logits: Tensor) -> int:
    """`argmax` in plain torch; -1 in place of an exception."""
    best = logits.max() if logits.numel() else torch.tensor(torch.nan)
    return int((logits == best).nonzero()[0]) if bool(best.isfinite()) else -1


def sample_min_p_reference(logits: Tensor, *, temperature: float, min_p: float, u: float) -> int:
    """`sample_min_p` in plain torch; -1 in place of an exception."""
    best = logits.max() if logits.numel() else torch.tensor(torch.nan)
    if not bool(best.isfinite()):
        return -1
    weights = ((logits.double() - best.double()) / temperature).exp()
    kept = (weights >= max(min_p, FLOOR)).nonzero()[:, 0]
    running = weights[kept].cumsum(0)
    place = int((running <= u * running[-1]).sum())
    return int(kept[min(place, kept.numel() - 1)])


def _without(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """A NaN or infinity stays: it says that the rest is in doubt, too."""
    if not banned:
        return logits
    ids = torch.tensor(banned)
    removed = torch.where(logits[ids] < torch.inf, -torch.inf, logits[ids])
    return logits.index_copy(0, ids, removed)


def _native(logits: Tensor) -> bool:
    """Whoever runs on the reference backend never waits for a build here: only a library already loaded counts."""
    # Attributes, no methods: a method of a tensor reads its arguments by code that is cold by the next token.
    return native.loaded() and logits.is_cpu and logits.dtype == torch.float32


def _checked(token: int, logits: Tensor) -> int:
    if token >= 0:
        return token
    if not logits.numel():
        raise NonFiniteError("there are no logits to draw from")
    bad = logits.isnan() | (logits == torch.inf)
    if bool(bad.any()):
        raise NonFiniteError(
            f"{int(bad.sum())} of the logits are NaN or infinite, the first at token {int(bad.nonzero()[0])}",
            hint="the checkpoint is damaged, or its activations overflow in this dtype",
        )
    raise NonFiniteError("every token is excluded: all logits are -infinity", hint="loosen the bans or the grammar")
