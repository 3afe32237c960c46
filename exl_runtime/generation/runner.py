"""Runs a step: chunks of sequences in, the logits each chunk wants (or the reason why not) out.

Knows no text, no sampling and no stopping. A pass that fails as a whole is repeated one sequence at a time, so that
only the sequences at fault are lost: running a chunk twice writes the same keys and values to the same places.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ..cache.storage import KVStorage
from ..config.spec import ModelSpec
from ..errors import ExlError, NonFiniteError
from ..model.batch import ForwardBatch
from ..ops.step import all_finite
from .scheduler import PREFILL_TOKENS as PASS
from .scheduler import Chunk

log = logging.getLogger(__name__)

Visit: TypeAlias = Callable[[int, Tensor], None]
Outcome: TypeAlias = Tensor | Exception | None  # float32 (chunk.rows, vocab) on the CPU; None: no rows were wanted


@dataclass(frozen=True, slots=True)
class Part:
    """New tokens of one sequence, at the cache indices start ... stop - 1 of these pages."""

    ids: Many[int]
    pages: Many[int]
    start: int
    stop: int


class Model(Protocol):
    """What of a Transformer is used here."""

    spec: ModelSpec
    device: torch.device

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> Tensor:
        """float32 logits (L, vocab)."""
        ...


class Runner:
    """Owns the tensors that describe a pass, and keeps those that do not change from one token to the next."""

    def __init__(self, model: Model, kv: KVStorage) -> None:
        self.model = model
        self.kv = kv
        self._pages_of: tuple[tuple[int, int], ...] = ()
        self._pages = torch.zeros(0)

    def run(self, chunks: Many[Chunk]) -> list[Outcome]:
        """Compute the chunks in one pass."""
        try:
            logits = self.model.forward(self._batch(chunks), self.kv)
        except Exception as err:  # whatever it is, it belongs to the owners of these requests
            if len(chunks) == 1:
                return [_explain(err, chunks[0])]
            log.warning("a pass over %d sequences failed (%s); running them one at a time", len(chunks), err)
            return [outcome for chunk in chunks for outcome in self.run([chunk])]
        logits = logits.cpu()  # once for all rows; drawing happens there
        if len(chunks) == 1 and all_finite(logits):
            return [logits if chunks[0].rows else None]
        finite = _finite_rows(logits)
        outcomes: list[Outcome] = []
        row = 0
        for chunk in chunks:
            rows = range(row, row + chunk.rows)
            row = rows.stop
            bad = [index for index in rows if not finite[index]]
            if bad:
                outcomes.append(_non_finite(chunk, logits[bad[0]], chunk.end - (rows.stop - bad[0]) + 1))
            else:
                outcomes.append(logits[rows.start : rows.stop] if len(rows) else None)
        return outcomes

    def each_logits(
        self, tokens: Many[int], pages: Many[int], rope_length: int, visit: Visit, *, first: int, chunk: int
    ) -> None:
        """`visit(position, logits)` for the logits after token `first` and all behind it, at most `chunk` at a time.

        logits: float32 (n, vocab) on the CPU, after the tokens position ... position + n - 1; valid during the call.
        """
        for start in range(0, len(tokens), chunk):
            stop = min(start + chunk, len(tokens))
            wanted = range(max(0, first - start), stop - start)
            part = Part(tokens[start:stop], pages, start, stop)
            batch = self.describe([part], wanted, (rope_length,), None)
            rows = self.model.forward(batch, self.kv)
            if len(wanted):
                visit(start + wanted.start, rows.cpu())

    def last_logits(self, ids: Many[int], pages: Many[int], start: int, rope_length: int) -> Tensor:
        """float32 (vocab,) on the CPU: after `ids` at the cache indices from `start`, `PASS` tokens at a time."""
        for at in range(0, len(ids), PASS):
            part = Part(ids[at : at + PASS], pages, start + at, start + min(at + PASS, len(ids)))
            wanted = [len(part.ids) - 1] if at + PASS >= len(ids) else []
            rows = self.model.forward(self.describe([part], wanted, (rope_length,), None), self.kv)
        return rows[0].cpu()

    def _batch(self, chunks: Many[Chunk]) -> ForwardBatch:
        parts = [Part(chunk.ids, chunk.sequence.pages, chunk.start, chunk.end) for chunk in chunks]
        rows: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.end - chunk.start
            rows += range(end - chunk.rows, end)
        lengths = tuple(chunk.sequence.rope_length for chunk in chunks)
        identity = tuple((chunk.sequence.order, chunk.sequence.version) for chunk in chunks)
        return self.describe(parts, rows, lengths, identity)

    def describe(
        self,
        parts: Many[Part],
        rows: Many[int],
        rope_lengths: tuple[int, ...],
        identity: tuple[tuple[int, int], ...] | None,
    ) -> ForwardBatch:
        """A pass over `parts` with the logits of `rows`. While `identity` stays the same, so do all pages."""
        size = self.kv.page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for part in parts:
            tokens += part.ids
            positions += range(part.start, part.stop)
            at = part.start
            while at < part.stop:  # a run of slots for every page that is touched
                until = min(part.stop, at - at % size + size)
                first = part.pages[at // size] * size + at % size
                slots += range(first, first + until - at)
                at = until
            starts.append(len(tokens))
        # Two transfers instead of seven: everything of one width travels in one tensor.
        total, wanted, sequences = len(tokens), len(rows), len(parts)
        wide = torch.tensor([*tokens, *positions, *slots, *rows], dtype=torch.int64).to(self.model.device)
        narrow = torch.tensor([*starts, *(part.stop for part in parts)], dtype=torch.int32).to(self.model.device)
        ids, places, kept, logit_rows = wide.split([total, total, total, wanted])
        q_starts, kv_lengths = narrow.split([sequences + 1, sequences])
        return ForwardBatch(
            tokens=ids,
            positions=places,
            slots=kept,
            q_starts=q_starts,
            kv_lengths=kv_lengths,
            pages=self._page_table(parts, identity),
            rope_lengths=rope_lengths,
            logit_rows=logit_rows,
            last_position=max((part.stop for part in parts), default=1) - 1,
        )

    def _page_table(self, parts: Many[Part], identity: tuple[tuple[int, int], ...] | None) -> Tensor:
        """int32 (S, P); the same tensor again while no sequence of the batch got another page."""
        if identity is None or identity != self._pages_of:
            width = max(len(part.pages) for part in parts)
            rows = [[*part.pages, *([0] * (width - len(part.pages)))] for part in parts]
            self._pages = torch.tensor(rows, dtype=torch.int32).to(self.model.device)
            self._pages_of = identity or ()
        return self._pages


def _finite_rows(logits: Tensor) -> list[bool]:
    return [True] * len(logits) if all_finite(logits) else torch.isfinite(logits).all(dim=-1).tolist()


def _non_finite(chunk: Chunk, logits: Tensor, position: int) -> NonFiniteError:
    bad = (~torch.isfinite(logits)).nonzero().flatten()
    return NonFiniteError(
        f"request {chunk.sequence.id}: {bad.numel()} of {logits.numel()} logits for position {position} are NaN or "
        f"infinite (the first is token {int(bad[0])})",
        hint="the weights are damaged or a kernel is wrong: try another backend, and check the files of the model",
    )


def _explain(err: Exception, chunk: Chunk) -> Exception:
    """A model's own complaint about numbers, with the request it happened in; anything else as it is."""
    if not isinstance(err, NonFiniteError):
        return err
    explained: ExlError = NonFiniteError(
        f"request {chunk.sequence.id}, positions {chunk.start} to {chunk.stop - 1}: {err.problem}", hint=err.hint
    )
    explained.__cause__ = err
    return explained
