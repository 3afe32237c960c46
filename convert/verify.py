"""Is the written folder the model it should be? Both models side by side, one layer at a time, on held-out rows."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from exl_runtime.errors import ConvertError

from .forward import LayerForward, logits
from .report import Divergence
from .source import Source
from .states import States
from .streaming import fill, through

SANE = 10.0  # nats of KL per token: beyond lies noise, not a damaged model
Room = Callable[[tuple[int, int, int]], States]


@torch.no_grad()
def compare(
    source: Source,
    result: Source,
    rows: Tensor,
    *,
    chunk: int,
    text: str,
    room: Room,
    advance: Callable[[int], None] = lambda count: None,
) -> Divergence:
    """KL(source || result) and perplexity over rows int64 (rows, length), float32 throughout.

    room: where hidden states of a shape may be kept. Perplexity counts every token but the first of a row.
    """
    count, length = rows.shape
    states = [_hidden(model, rows, chunk, room, advance) for model in (source, result)]
    # Only now, as heads are as large as many layers.
    ends = [(model.spec, model.final_norm(), model.head()) for model in (source, result)]
    found, same = [], 0
    lost = [0.0, 0.0]
    for at in range(count):
        scores = [
            torch.log_softmax(logits(spec, held.read(at, at + 1).to(head.device)[0], norm, head), dim=-1)
            for held, (spec, norm, head) in zip(states, ends, strict=True)
        ]
        p, q = scores[0], scores[1].to(scores[0].device)
        found.append((p.exp() * (p - q)).sum(dim=-1).double().cpu())
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        wanted = rows[at, 1:].to(p.device)
        lost[0] += float(F.nll_loss(p[:-1], wanted, reduction="sum"))
        lost[1] += float(F.nll_loss(q[:-1], wanted, reduction="sum"))
    for held in states:
        held.discard()
    kl = torch.cat(found)
    scored = count * (length - 1)
    return Divergence(
        tokens=kl.numel(),
        kl_mean=float(kl.mean()),
        kl_median=float(kl.median()),
        kl_p99=float(kl.quantile(0.99)) if kl.numel() < 2**24 else float(kl.sort().values[int(0.99 * kl.numel())]),
        top1=same / kl.numel(),
        perplexity=_exp(lost[1] / max(1, scored)),
        source_perplexity=_exp(lost[0] / max(1, scored)),
        text=text,
    )


def _hidden(model: Source, rows: Tensor, chunk: int, room: Room, advance: Callable[[int], None]) -> States:
    """The last hidden states of all rows, one layer in memory at a time."""
    states = room((*rows.shape, model.spec.hidden_size))
    fill(states, model.spec, model.embedding(), rows, chunk)
    for layer in model.spec.layers:
        # The weights live for the call only: never two layers at once.
        forward = LayerForward(model.spec, layer, rows.shape[1], model.device)
        through(forward, model.layer(layer.index), states, states, chunk)
        advance(1)
    return states


def require_sane(found: Divergence, folder: str) -> None:
    """ConvertError when the result is not a working model: nothing such is ever announced as a success."""
    if not math.isfinite(found.kl_mean) or found.kl_mean > SANE:
        raise ConvertError(
            f"{folder}: the finished model does not work: its divergence from the source is {found.kl_mean:.3g} nats "
            "per token",
            hint="more bits help if very few were asked for; otherwise please report it",
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
