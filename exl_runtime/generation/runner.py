"""Runs a step: chunks of sequences in, the logits each chunk wants (or the reason why not) out.

Knows no text, no sampling and no stopping. A pass that fails as a whole is repeated one sequence at a time, so that
only the sequences at fault are lost: running a chunk twice writes the same keys and values to the same places.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..cache.storage import KVStorage
from ..config.spec import ModelSpec
from ..errors import ExlError, NonFiniteError
from ..model.adapted import Adapted
from ..model.batch import ForwardBatch, Plan
from ..model.lora import Mix
from ..model.step import NO_MORE, WHOLE, Onward
from .scheduler import PREFILL_TOKENS as PASS
from .scheduler import Chunk

log = logging.getLogger(__name__)

Visit: TypeAlias = Callable[[int, Tensor], None]
# float32 (chunk.rows, vocab) on the CPU, or the tokens drawn behind these rows; None: no rows were wanted.
Outcome: TypeAlias = Tensor | list[int] | Exception | None
How: TypeAlias = tuple[float, float, float, Many[int]]  # a draw: temperature (0: the best), min_p, u, banned ids


@dataclass(frozen=True, slots=True)
class Part:
    """New tokens of one sequence, at cache indices start ... stop - 1 of its pages in every pool, under these adapters;
    rope positions are `shift` more."""

    ids: Many[int]
    tables: Many[Many[int]]
    start: int
    stop: int
    mix: Mix = ()
    shift: int = 0


class Model(Protocol):
    """What of a Transformer is used here; its `forward_plan`, where there is one, in place of `forward`."""

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
        self._adapted: Adapted | None = None
        self._on_cpu = model.device.type == "cpu"
        self._plans = hasattr(model, "forward_plan")  # a Transformer's: no tensors for a few numbers
        self._halt: Callable[[], None] | None = getattr(model, "halt", None)

    def run(self, chunks: Many[Chunk]) -> list[Outcome]:
        """Compute the chunks in one pass."""
        try:
            logits = self.compute(self._plan_of(chunks))
        except Exception as err:  # whatever it is, it belongs to the owners of these requests
            if len(chunks) == 1:
                return [_explain(err, chunks[0])]
            log.warning("a pass over %d sequences failed (%s); running them one at a time", len(chunks), err)
            return [outcome for chunk in chunks for outcome in self.run([chunk])]
        if len(chunks) == 1 and self._plans:
            return [logits if chunks[0].rows else None]
        # What takes plans vouches for its logits.
        finite = [True] * len(logits) if self._plans else torch.isfinite(logits).all(dim=-1).tolist()
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

    @property
    def draws(self) -> bool:
        """Whether `draw` has a chance."""
        return getattr(self.model, "draws", False)

    def halt(self) -> None:
        """End the pass that the model runs ahead of being asked, if it does: before anybody else touches the pages."""
        if self._halt is not None:
            self._halt()

    def draw(self, chunks: Many[Chunk], hows: Many[How], onward: Onward = NO_MORE) -> list[Outcome] | None:
        """`run` where the model itself draws the tokens behind all rows, one for each of `hows`.

        The model may begin the pass behind this one by itself, see `onward.py`.
        None: it cannot, or something is wrong with a row. Then `run` has to repeat the pass, and will say what.
        """
        if sum(c.end - c.start for c in chunks) > WHOLE:
            return None
        plan = self._plan_of(chunks)
        model: Any = self.model
        draws = [number for how in hows for number in how[:3]]
        banned = [number for how in hows for number in (len(how[3]), *how[3])]
        try:
            if plan.mixes:
                tokens = self._with_adapters.draw_plan(plan, self.kv, draws, banned)
            else:
                tokens = model.draw_plan(plan, self.kv, draws, banned, onward)
        except Exception as err:
            log.warning("a pass that draws its tokens failed (%s); running it once more", err)
            return None
        if tokens is None or len(chunks) == 1:
            return None if tokens is None else [tokens or None]
        outcomes: list[Outcome] = []
        for chunk in chunks:
            outcomes.append(tokens[: chunk.rows] or None)
            del tokens[: chunk.rows]
        return outcomes

    def each_logits(
        self,
        tokens: Many[int],
        tables: Many[Many[int]],
        rope_length: int,
        visit: Visit,
        *,
        first: int,
        chunk: int,
        mix: Mix = (),
    ) -> None:
        """`visit(position, logits)` for the logits after token `first` and all behind it, at most `chunk` at a time.

        logits: float32 (n, vocab) on the CPU, after the tokens position ... position + n - 1; valid during the call.
        """
        for start in range(0, len(tokens), chunk):
            stop = min(start + chunk, len(tokens))
            wanted = range(max(0, first - start), stop - start)
            part = Part(tokens[start:stop], tables, start, stop, mix)
            rows = self.compute(self.plan([part], wanted, (rope_length,), None))
            if len(wanted):
                visit(start + wanted.start, rows)

    def last_logits(
        self, ids: Many[int], tables: Many[Many[int]], start: int, rope_length: int, *, mix: Mix = ()
    ) -> Tensor:
        """float32 (vocab,) on the CPU: after `ids` at the cache indices from `start`, `PASS` tokens at a time."""
        for at in range(0, len(ids), PASS):
            part = Part(ids[at : at + PASS], tables, start + at, start + min(at + PASS, len(ids)), mix)
            wanted = [len(part.ids) - 1] if at + PASS >= len(ids) else []
            rows = self.compute(self.plan([part], wanted, (rope_length,), None))
        return rows[0]

    def compute(self, plan: Plan) -> Tensor:
        """float32 logits (L, vocab) on the CPU, where drawing happens."""
        model: Any = self.model
        if plan.mixes:
            self.halt()
            logits = self._with_adapters.forward_plan(plan, self.kv)
        else:
            logits = model.forward_plan(plan, self.kv) if self._plans else model.forward(plan.on(model.device), self.kv)
        return logits if self._on_cpu else logits.cpu()

    @property
    def _with_adapters(self) -> Adapted:
        if self._adapted is None:
            model: Any = self.model
            self._adapted = Adapted(model)
        return self._adapted

    def _plan_of(self, chunks: Many[Chunk]) -> Plan:
        parts = [
            Part(c.ids, c.sequence.tables, c.start, c.end, c.sequence.request.lora, c.sequence.shift) for c in chunks
        ]
        rows: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.end - chunk.start
            rows += range(end - chunk.rows, end)
        lengths = tuple(chunk.sequence.rope_length for chunk in chunks)
        identity = tuple((chunk.sequence.order, chunk.sequence.version) for chunk in chunks)
        return self.plan(parts, rows, lengths, identity)

    def plan(
        self,
        parts: Many[Part],
        rows: Many[int],
        rope_lengths: tuple[int, ...],
        identity: tuple[tuple[int, int], ...] | None,
    ) -> Plan:
        """A pass over `parts` with the logits of `rows`. While `identity` stays the same, so do all pages."""
        size = self.kv.page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for part in parts:
            tokens += part.ids
            positions += range(part.start + part.shift, part.stop + part.shift)
            starts.append(len(tokens))
        for pool in range(len(parts[0].tables)):
            for part in parts:
                at, pages = part.start, part.tables[pool]
                while at < part.stop:  # a run of slots for every page that is touched
                    until = min(part.stop, at - at % size + size)
                    first = pages[at // size] * size + at % size
                    slots += range(first, first + until - at)
                    at = until
        return Plan(
            tokens=tokens,
            positions=positions,
            slots=slots,
            q_starts=starts,
            kv_lengths=[part.stop for part in parts],
            pages=self._page_table(parts, identity),
            rope_lengths=rope_lengths,
            logit_rows=rows,
            mixes=tuple(part.mix for part in parts) if any(part.mix for part in parts) else (),
        )

    def _page_table(self, parts: Many[Part], identity: tuple[tuple[int, int], ...] | None) -> Tensor:
        """int32 (pools * S, P), see `Plan`; the same tensor while no sequence of the batch got another page."""
        if identity is None or identity != self._pages_of:
            tables = [table for pool in zip(*(part.tables for part in parts), strict=True) for table in pool]
            width = max(map(len, tables))
            rows = [[*table, *([0] * (width - len(table)))] for table in tables]
            self._pages = torch.tensor(rows, dtype=torch.int32).to(self.model.device)
            self._pages_of = identity or ()
        return self._pages


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
