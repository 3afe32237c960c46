"""Log-probabilities of a whole vocabulary in two bytes each, and the divergence of another distribution from them.

A code is round(65535 (p / p_max)^(1/3)), p_max the largest probability of its row: near p_max it is exact to 2e-5 of
p, and what lies below 4e-16 p_max becomes zero. Decoded rows are scaled to a sum of 1, so a row needs nothing beside
its codes. The divergence is a sum weighted by p, hence the code that is finest where p is large: with a uniform code
for log p, or float16, the mean over peaked distributions is off by up to 1e-5 nats, with this one by less than 1e-6.
Knows no model and no files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

LEVELS = 65535
ROOT = 3
_BLOCK = 2**17  # entries at once: a few arrays of 1 MiB stay in the processor's cache, which halves the time


@dataclass(frozen=True, slots=True)
class Rows:
    """What one model says at the n scored tokens of a window.

    codes   uint16 (n, vocab), see the top of this file
    top     int32 (n,): the most likely token; codes cannot tell what differs by less than their step
    nll     float64 (n,): minus the log-probability of the token that is there, in nats
    """

    codes: np.ndarray
    top: np.ndarray
    nll: np.ndarray

    @classmethod
    def empty(cls, n: int, vocab: int) -> "Rows":
        """Room for n tokens, to be filled by `put`."""
        return cls(np.empty((n, vocab), "<u2"), np.empty(n, "<i4"), np.empty(n, "<f8"))

    def put(self, positions: slice, logprobs: Tensor, targets: Tensor) -> None:
        """Fill in the tokens `positions`. logprobs: float32 (m, vocab); targets: int64 (m,)."""
        self.codes[positions] = encode(logprobs)
        self.top[positions] = logprobs.argmax(dim=1).numpy()
        self.nll[positions] = nll(logprobs, targets)


def encode(logprobs: Tensor) -> np.ndarray:
    """float32 (m, vocab) natural logarithms, of any common offset -> uint16 (m, vocab)."""
    codes = np.empty(logprobs.shape, "<u2")
    for block in _blocks(logprobs):
        rows = logprobs[block]
        scaled = (rows - rows.amax(dim=1, keepdim=True)).div_(ROOT).exp_().mul_(LEVELS).round_()
        codes[block] = scaled.to(torch.int32).numpy()
    return codes


def decode(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint16 (m, vocab) -> probabilities and their logarithms, float64; p is 0 with a finite logarithm for code 0."""
    powers, logs = _tables()
    p = powers[codes]
    total = p.sum(axis=1, keepdims=True)
    p /= total
    return p, logs[codes] - np.log(total)


def divergence(codes: np.ndarray, logprobs: Tensor) -> np.ndarray:
    """float64 (m,): KL(p || q) = sum of p (log p - log q), in nats.

    codes      of p, uint16 (m, vocab)
    logprobs   of q, float32 (m, vocab); scaled to a sum of 1 in float64, as a float32 log-softmax over 128k tokens
               misses it by as much as 1e-5
    """
    q = logprobs.numpy()
    found = np.empty(len(codes))
    for block in _blocks(logprobs):
        p, log_p = decode(codes[block])
        log_p -= q[block]
        log_p *= p
        found[block] = log_p.sum(axis=1)
    return found + _log_total(logprobs)


def nll(logprobs: Tensor, targets: Tensor) -> np.ndarray:
    """float64 (m,): minus the log-probability of each target, in nats, of rows scaled to a sum of 1."""
    return _log_total(logprobs) - logprobs.gather(1, targets[:, None])[:, 0].double().numpy()


def _log_total(logprobs: Tensor) -> np.ndarray:
    """float64 (m,): the logarithm of the sum of the probabilities; 0 but for rounding."""
    total = np.empty(len(logprobs))
    for block in _blocks(logprobs):
        total[block] = logprobs[block].double().exp_().sum(dim=1).numpy()
    return np.log(total)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """The rows of a matrix in parts of at most `_BLOCK` entries, or one row."""
    step = max(1, _BLOCK // rows.shape[1])
    return (slice(at, at + step) for at in range(0, len(rows), step))


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """float64 (65536,): of every code, p / p_max and its logarithm."""
    root = np.arange(LEVELS + 1) / LEVELS
    return root**ROOT, ROOT * np.log(np.maximum(root, 0.5 / LEVELS))
