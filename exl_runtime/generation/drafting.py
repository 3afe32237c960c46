"""A second, smaller model that guesses what the first will say.

Its keys and values lie in pages with the same numbers as the first model's: page p of both belongs to the same
tokens, so the prefix cache, copies and yielded pages serve both. Where it did not compute a page it guesses badly
until that page is replaced; what is generated depends on none of this.
"""

import logging
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.pages import PageCopy
from ..cache.storage import KVStorage
from ..errors import ExlError
from .runner import Model, Part, Runner
from .scheduler import Chunk
from .sequence import Sequence

log = logging.getLogger(__name__)
SURE = 0.3  # a guess less likely than this, by the draft model's own account, ends the draft


@dataclass(slots=True)
class _Job:
    sequence: Sequence
    tokens: list[int]  # to compute next, from `start`
    start: int
    guess: list[int]


class Drafter:
    """One draft model. `vocab_size`: logits of the model it drafts for."""

    def __init__(self, model: Model, kv: KVStorage, *, vocab_size: int) -> None:
        self.model = model
        self.kv = kv
        self._vocab_size = vocab_size
        self._runner = Runner(model, kv)

    def copy(self, copy: PageCopy) -> None:
        """Do as the first model's cache does."""
        self.kv.copy_page(copy.source, copy.target, copy.tokens, copy.pool)

    def follow(self, chunks: Many[Chunk]) -> None:
        """Compute what the first model computed, so that drafts can begin there."""
        behind = [(chunk.sequence, chunk.stop) for chunk in chunks if chunk.sequence.draft_length < chunk.stop]
        parts = [(s, s.tokens[s.draft_length : stop], s.draft_length) for s, stop in behind]
        if self._pass(parts, wanted=False) is not None:
            for sequence, stop in behind:
                sequence.draft_length = stop

    def draft(self, sequences: Many[Sequence]) -> None:
        """Fill `draft` of each, up to its `room`; less where the draft model is not sure."""
        jobs = [_Job(s, s.tokens[s.draft_length :], s.draft_length, []) for s in sequences if s.room > 0]
        while jobs:
            rows = self._pass([(job.sequence, job.tokens, job.start) for job in jobs], wanted=True)
            if rows is None:
                break
            going = []
            for job, row in zip(jobs, rows, strict=True):
                sequence = job.sequence
                sequence.draft_length = job.start + len(job.tokens)
                token = self._guess(sequence, row, job.guess)
                if token is None:
                    continue
                job.guess.append(token)
                sequence.draft = job.guess
                if len(job.guess) < sequence.room:
                    job.start, job.tokens = sequence.draft_length, [token]
                    going.append(job)
            jobs = going

    def _guess(self, sequence: Sequence, row: Tensor, guess: list[int]) -> int | None:
        if float(torch.softmax(row, dim=-1).max()) < SURE:
            return None
        width = self._vocab_size
        if row.numel() != width:  # padding rows of the embedding differ between sizes of one family
            fitted = torch.full((width,), -torch.inf)
            fitted[: min(width, row.numel())] = row[:width]
            row = fitted
        try:
            # With the random number that the first model's own draw will use: alike distributions, alike tokens.
            return sequence.sampler.guess(row, sequence.prompt, [*sequence.generated, *guess])
        except ExlError:
            return None

    @torch.inference_mode()
    def _pass(self, work: Many[tuple[Sequence, list[int], int]], *, wanted: bool) -> Tensor | None:
        """float32 (sequences, vocab) on the CPU, after the last token of each; None when it failed."""
        work = [part for part in work if part[1]]
        if not work:
            return None
        parts = [Part(ids, s.tables, start, start + len(ids), shift=s.shift) for s, ids, start in work]
        rows, end = [], -1
        for part in parts:
            end += len(part.ids)
            rows += [end] if wanted else []
        try:
            lengths = tuple(self.model.spec.rope_length(s.planned) for s, _, _ in work)
            return self._runner.compute(self._runner.plan(parts, rows, lengths, None))
        except Exception as err:  # guessing is optional
            log.warning("the draft model failed, going on without: %s", err)
            return None
