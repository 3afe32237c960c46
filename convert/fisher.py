"""What an error in the hidden states costs: the Fisher information of the source behind every layer, for `blocktune`.

F = E[g g^T] over tokens, (hidden, hidden), with g the gradient, at the hidden states of a token, of the log-probability
of tokens drawn from the source's own predictions: the second-order term of KL(source || result), tokens apart.
"""

import torch
from torch import Tensor

from exl_runtime.checkpoint.writer import write_tensors
from exl_runtime.console.progress import Progress

from .forward import LayerForward
from .measuring import forward_states, measuring_rows, top_gradients
from .source import Source
from .states import States
from .workspace import Workspace


def collect(source: Source, space: Workspace, rows: Tensor, chunk: int, seed: int, progress: Progress) -> None:
    """Fisher information (hidden, hidden) at the outputs of every layer, a file each, from a few of `rows`.

    One pass of the source forward and one back over the rows that are measured on; nothing when all files exist.
    """
    layers = len(source.spec.layers)
    if all(space.fisher(i).exists() for i in range(layers)):
        return
    picked = measuring_rows(rows)
    inputs = forward_states(source, space, picked, layers, chunk, progress)
    gradient = top_gradients(source, inputs.pop(), seed)
    with progress.stage("measuring: Fisher information", layers, "layers") as bar:
        for i in reversed(range(layers)):
            held = inputs.pop()
            write_tensors(space.fisher(i), {"fisher": _second_moment(gradient, source.device).cpu()})
            if i:
                gradient = _back(source, i, held, gradient, chunk)
            held.discard()
            bar.advance()


def _second_moment(gradient: Tensor, device: torch.device) -> Tensor:
    total = torch.zeros(gradient.shape[-1], gradient.shape[-1], device=device)
    for row in gradient:
        g = row.to(device)
        total.addmm_(g.t(), g)
    return total / (gradient.shape[0] * gradient.shape[1])


@torch.enable_grad()
def _back(source: Source, i: int, inputs: States, gradient: Tensor, chunk: int) -> Tensor:
    """Gradient at the outputs of layer i -> at its inputs, both float32 (rows, length, hidden), on the CPU."""
    forward = LayerForward(source.spec, source.spec.layers[i], inputs.shape[1], source.device)
    weights = source.layer(i)
    below = torch.empty(inputs.shape)
    for at in range(0, inputs.rows, chunk):
        stop = min(at + chunk, inputs.rows)
        x = inputs.read(at, stop).to(source.device).requires_grad_(True)
        forward(x, weights).backward(gradient[at:stop].to(source.device))
        below[at:stop] = x.grad.cpu()
    return below
