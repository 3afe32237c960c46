"""What a model says about the tokens of a window."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exl_runtime.errors import EvalError, UsageError

from .protocol import Window

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime

Visit = Callable[[slice, Tensor], None]
_BLOCK = 2**24  # log-probabilities handed over at once: 64 MiB


def score(runtime: "Runtime", window: Window, visit: Visit) -> None:
    """Log-probabilities of every token of the vocabulary at every scored place of `window`, in parts and in order.

    visit(positions, logprobs)   positions: which of the scored tokens, a slice of 0 ... len(ids) - first
                                 logprobs: float32 (m, vocab), natural logarithms, on the CPU; given all tokens before
                                 each of them in the window. Valid during the call.
    Raises EvalError, naming the model: NaN or infinite logits, or a token that the model does not have; PromptTooLong
    for a window longer than the context.
    """

    def take(position: int, rows: Tensor) -> None:
        # The rows begin after token first - 1; the one after the last token predicts nothing of the window.
        start = position - (window.first - 1)
        rows = rows[: max(0, scored - start)]
        step = max(1, _BLOCK // rows.shape[1])
        for at in range(0, len(rows), step):
            block = rows[at : at + step]
            if not torch.isfinite(block).all():
                bad = int((~torch.isfinite(block)).any(dim=1).nonzero()[0])
                raise EvalError(
                    f"{runtime.info.name}: NaN or infinite logits after token {position + at + bad} of a window of "
                    f"{len(window.ids)}",
                    hint="the weights are damaged, or the activations overflow: try another --cache or --backend",
                )
            visit(slice(start + at, start + at + len(block)), torch.log_softmax(block, dim=1))

    scored = len(window.ids) - window.first
    try:
        # The whole window, although its last token predicts nothing: some rope kinds depend on the length.
        runtime.each_logits(window.ids, take, first=window.first - 1)
    except UsageError as err:
        raise EvalError(
            f"{runtime.info.name}: {err.problem}",
            hint=err.hint or "the text gives tokens that the model lacks: its tokenizer belongs to another model",
        ) from err


def token_nll(runtime: "Runtime", window: Window) -> Tensor:
    """float64 (len(ids) - first,): minus the log-probability of each scored token, in nats. Raises as `score`."""
    targets = torch.tensor(window.ids[window.first :])
    nll = torch.empty(len(targets), dtype=torch.float64)

    def visit(positions: slice, logprobs: Tensor) -> None:
        nll[positions] = -logprobs.gather(1, targets[positions, None])[:, 0].double()

    score(runtime, window, visit)
    return nll
