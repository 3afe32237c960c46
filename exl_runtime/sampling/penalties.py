"""What depends on the tokens so far: repetition, frequency and presence penalties, DRY, banned n-grams.

Every function takes float32 logits (vocab,) and the history, int64 (tokens,), oldest first, prompt and reply together;
ids equal to vocab stand for tokens without a logit. All are vectorised: a call costs O(history + vocab).
"""

import numpy as np
from numpy.typing import NDArray

from .transforms import REMOVED, Logits

Tokens = NDArray[np.int64]


def fade(tokens: int, reach: int, decay: int) -> NDArray[np.float64]:
    """How much each of the latest tokens counts, oldest first, at most `tokens` of them.

    The latest `reach` (-1: all) count 1, the `decay` before them fade linearly: the i-th of those, i = 1 the latest,
    counts 1 - i / (decay + 1).
    """
    if reach < 0 or reach >= tokens:
        return np.ones(tokens)
    slope = 1 - np.arange(decay, 0, -1) / (decay + 1)
    return np.concatenate((slope, np.ones(reach)))[-tokens:] if decay + reach else np.ones(0)


def repetition_frequency_presence(
    x: Logits,
    history: Tokens,
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    reach: int = -1,
    decay: int = 0,
) -> Logits:
    """The three classic penalties on tokens that occur among the latest ones.

    repetition  positive logits are divided by it, negative ones multiplied (Keskar et al. 2019, CTRL)
    frequency   subtracted once per occurrence          presence  subtracted once (both: OpenAI)

    in this order. With `decay` (see `fade`) an occurrence counts w: the repetition penalty of a token becomes
    1 + (repetition - 1) * w of its latest occurrence, presence is scaled by the same w, and frequency by the sum of
    w over all occurrences. As in exllamav2 and llama.cpp all three look at prompt and reply (vLLM's frequency and
    presence look at the reply alone).
    """
    w = fade(history.size, reach, decay)
    if w.size == 0:
        return x
    window = history[history.size - w.size :]
    counts = np.bincount(window, weights=w, minlength=x.size + 1)[: x.size]
    ids = np.flatnonzero(counts)
    latest = np.zeros(x.size + 1)
    latest[window] = w  # of several writes to one place the last stays: the latest occurrence
    latest = latest[ids]
    logits = x[ids].astype(np.float64)
    factor = 1 + (repetition - 1) * latest
    logits = np.where(logits > 0, logits / factor, logits * factor)
    logits -= frequency * counts[ids] + presence * latest
    changed = x.copy()
    changed[ids] = logits
    return changed


def dry(
    x: Logits,
    history: Tokens,
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
    max_ngram: int,
    reach: int = 0,
    breakers: NDArray[np.bool_] | None = None,
) -> Logits:
    """Penalises the token that would go on repeating the longest earlier sequence ("don't repeat yourself").

    Source: p-e-w's proposal for text-generation-webui (pull request 5677). For every earlier token t, let n be how far
    the tokens before it equal the last tokens of the history; the largest n of t, if n >= allowed_length, costs its
    logit multiplier * base ^ (n - allowed_length). Matches hold no breaker (bool (vocab + 1,)) and count at most
    `max_ngram` tokens, and a breaker is never penalised. `reach` limits the search to the latest tokens (<= 0: all).

    All candidates are extended together, one token a round, so the cost is linear in the history for a given max_ngram.
    """
    h = history[-reach:] if reach > 0 else history
    longest = min(max_ngram, h.size - 1)
    if breakers is not None and longest > 0:
        found = np.flatnonzero(breakers[h[::-1][:longest]])
        longest = int(found[0]) if found.size else longest
    if longest < 1:
        return x
    ends = np.flatnonzero(h[:-1] == h[-1])
    follows = h[ends + 1]
    ok = follows < x.size
    if breakers is not None:
        ok &= ~breakers[follows]
    ends, follows = ends[ok], follows[ok]
    lengths = np.ones(ends.size, dtype=np.int64)
    alive = np.arange(ends.size)
    for back in range(1, longest):
        alive = alive[ends[alive] >= back]
        alive = alive[h[ends[alive] - back] == h[-1 - back]]
        if alive.size == 0:
            break
        lengths[alive] += 1
    repeats = lengths >= allowed_length
    if not repeats.any():
        return x
    with np.errstate(over="ignore"):
        cost = multiplier * np.power(base, (lengths[repeats] - allowed_length).astype(np.float64))
    worst = np.zeros(x.size)
    np.maximum.at(
        worst, follows[repeats], np.minimum(cost, 1e30)
    )  # 1e30 is beyond any draw, and still finite in float32
    return (x - worst).astype(np.float32)


def no_repeat_ngram(x: Logits, history: Tokens, size: int) -> Logits:
    """Removes tokens that would complete a sequence of `size` tokens that occurred before (Paulus et al. 2017).

    As Hugging Face's NoRepeatNGramLogitsProcessor, except that the best token stays if all would go.
    """
    if history.size < size:
        return x
    starts = np.arange(history.size - size + 1)
    for i in range(size - 1):
        starts = starts[history[starts + i] == history[history.size - size + 1 + i]]
        if starts.size == 0:
            return x
    seen = history[starts + size - 1]
    changed = x.copy()
    changed[seen[seen < x.size]] = REMOVED
    best = int(x.argmax())
    if changed.max() == REMOVED:
        changed[best] = x[best]
    return changed
