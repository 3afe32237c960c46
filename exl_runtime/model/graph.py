"""Decoding by recorded passes: one CUDA graph per batch size and page-table width, from the tokens to the next tokens.

A recorded step reads and writes the same buffers every time, draws on the device, and writes the inputs of the next
step over its own: the next one is launched before the host has read the tokens of this one. What does not fit is run
as usual, with a reason. Knows no sampling beyond the `Chooser`; how a pass is recorded is the `Recorder`'s affair.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cache.storage import KVStorage
from ..config.spec import ModelSpec
from ..ops.sample_cuda import advance
from .batch import ForwardBatch

MOST_ROWS = 8  # sequences of one recorded step: the kernels' results are the same bits up to here


class Recordable(Protocol):
    """What of a model is used here; `fused.FusedTransformer` is one."""

    spec: ModelSpec
    device: torch.device

    def run(self, batch: ForwardBatch, kv: KVStorage) -> Tensor:
        """Float32 logits (L, vocab), without asking the host anything."""
        ...

    def why_not_recorded(self, kv: KVStorage) -> str | None:
        """None, or what in a pass has to ask the host."""
        ...

    def held_by(self, batch: ForwardBatch) -> tuple[object, ...]:
        """What a pass uses and the model may drop: it is kept as long as the recording."""
        ...


class Chooser(Protocol):
    """Draws on the device; `sampling.device.DeviceSampling` is one."""

    def kind(self, slots: Sequence[int]) -> Hashable:
        """What the recorded step depends on."""
        ...

    def prepare(self, kind: Any) -> None:
        """Make everything that drawing of this kind needs: nothing may be allocated later."""
        ...

    def sample(self, logits: Tensor, slots: Tensor, out: Tensor, *, kind: Any) -> None:
        """One token for each row into `out`, int64; -1: none can be drawn."""
        ...


class Fetch(Protocol):
    """Numbers on their way to the host."""

    def wait(self) -> list[int]:
        """Them."""
        ...


class Recorder(Protocol):
    """How work is recorded and repeated on a device."""

    def why_not(self) -> str | None:
        """None if this device can record."""
        ...

    def record(self, warm_up: Callable[[], None], body: Callable[[], None]) -> Callable[[], None]:
        """Run `warm_up`, record `body` without running it, and return what repeats it."""
        ...

    def upload(self, values: Sequence[int], target: Tensor) -> None:
        """Write numbers into a contiguous tensor, after all work launched so far."""
        ...

    def fetch(self, source: Tensor) -> Fetch:
        """Send what `source` holds after all work launched so far; work launched later does not change it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence that decodes one token.

    owner   who it is; equal only for the same sequence
    token   to compute, at cache index `length`
    pages   of the sequence, those of `length` and perhaps of later tokens included
    slot    of the `Chooser`
    shift   rope position of the token, less `length`
    """

    owner: Hashable
    token: int
    length: int
    pages: Sequence[int]
    rope_length: int
    slot: int
    shift: int = 0


@dataclass(slots=True)
class _Recorded:
    """One bucket: its buffers and the recorded step over them."""

    batch: ForwardBatch
    slots: Tensor  # int32 (rows,) of the Chooser
    drawn: Tensor  # int64 (rows,)
    repeat: Callable[[], None]
    keep: tuple[object, ...]


@dataclass(slots=True)
class _Flight:
    """A step that was launched: what it computes, and its tokens on the way."""

    key: Hashable
    rows: tuple[
        tuple[Hashable, int, int, int | None], ...
    ]  # owner, slot, length, token (None: that of the step before)
    fetch: Fetch


class DecodeGraphs:
    """Not thread-safe. `step` takes what `refuses` lets through; `drop` before anything else runs in between."""

    def __init__(self, model: Recordable, kv: KVStorage, chooser: Chooser, recorder: Recorder) -> None:
        self._model = model
        self._kv = kv
        self._chooser = chooser
        self._recorder = recorder
        self._recorded: dict[Hashable, _Recorded] = {}
        self._broken: str | None = None
        self._ahead: _Flight | None = None
        self._pages: list[list[int]] = []  # what the page table of the last step holds
        self._tokens: list[int] = []  # what the last step drew

    @property
    def buckets(self) -> int:
        """Steps that were recorded."""
        return len(self._recorded)

    def refuses(self, rows: Sequence[Row]) -> str | None:
        """None if `step` can take these rows, else why they have to run as usual."""
        why = self._broken or self._recorder.why_not() or self._model.why_not_recorded(self._kv)
        if why is None and len(self._kv.counts) > 1:
            why = "layers with windows have pages of their own"
        if why is not None:
            return why
        if not 1 <= len(rows) <= MOST_ROWS:
            return f"{len(rows)} sequences at once; recorded steps take up to {MOST_ROWS}"
        if len({self._ropes(row.rope_length) for row in rows}) > 1:
            return "the sequences turn by different rope frequencies"
        return None

    def continues(self, rows: Sequence[Row]) -> bool:
        """Whether the step that was launched ahead is the one over `rows`."""
        flight = self._ahead
        if flight is None or len(flight.rows) != len(rows):
            return False
        for place, (row, (owner, slot, length)) in enumerate(zip(rows, flight.rows, strict=True)):
            used = length // self._kv.page_size + 1
            if (row.owner, row.slot, row.length, row.token) != (owner, slot, length, self._tokens[place]):
                return False
            if [*row.pages[:used]] != self._pages[place][:used]:
                return False
        return True

    def drop(self) -> tuple[int, ...]:
        """Forget a step that was launched ahead; the slots of the `Chooser` that are one token too far."""
        flight, self._ahead = self._ahead, None
        if flight is None:
            return ()
        flight.fetch.wait()  # so that it is known to be over
        return tuple(slot for _, slot, _ in flight.rows)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[int]:
        """The token drawn behind each row, -1 where there is none. Launches the step after this one, if it may.

        Raises RuntimeError when a step is ahead that these rows do not continue, and what recording raises.
        """
        if self._ahead is not None and not self.continues(rows):
            raise RuntimeError("a step over other rows is ahead: drop it first")
        flight = self._ahead or self._start(rows)
        self._ahead = self._launch_next(flight, rows)
        self._tokens = flight.fetch.wait()
        return self._tokens

    # --- launching --------------------------------------------------------------------------------------------

    def _start(self, rows: Sequence[Row]) -> _Flight:
        width = 1
        while width < max(len(row.pages) for row in rows):
            width *= 2
        kind = self._chooser.kind([row.slot for row in rows])
        key = (len(rows), width, self._ropes(rows[0].rope_length), kind)
        found = self._recorded.get(key)
        if found is None:
            try:
                found = self._record(rows, width, kind)
            except Exception as err:
                self._broken = f"recording a step failed: {err}"
                raise
            self._recorded[key] = found
        else:
            self._fill(found, rows)
        return self._launch(key, tuple((row.owner, row.slot, row.length) for row in rows))

    def _launch_next(self, flight: _Flight, rows: Sequence[Row]) -> _Flight | None:
        """The step behind `flight`, unless a row has no page for it yet."""
        size = self._kv.page_size
        recorded = self._recorded[flight.key]
        if any((row.length + 1) // size >= len(row.pages) for row in rows):
            return None
        if any(len(row.pages) > recorded.batch.pages.shape[1] for row in rows):
            return None
        if [[*row.pages] for row in rows] != self._pages:
            self._fill_pages(recorded, rows)
        return self._launch(flight.key, tuple((row.owner, row.slot, row.length + 1) for row in rows))

    def _launch(self, key: Hashable, rows: tuple[tuple[Hashable, int, int], ...]) -> _Flight:
        recorded = self._recorded[key]
        recorded.repeat()
        return _Flight(key, rows, self._recorder.fetch(recorded.drawn))

    # --- recording --------------------------------------------------------------------------------------------

    def _record(self, rows: Sequence[Row], width: int, kind: Hashable) -> _Recorded:
        count, device = len(rows), self._model.device
        wide = torch.zeros(3, count, dtype=torch.int64, device=device)
        batch = ForwardBatch(
            tokens=wide[0],
            positions=wide[1],
            slots=wide[2],
            q_starts=torch.arange(count + 1, dtype=torch.int32, device=device),
            kv_lengths=torch.ones(count, dtype=torch.int32, device=device),
            pages=torch.zeros(count, width, dtype=torch.int32, device=device),
            rope_lengths=tuple(row.rope_length for row in rows),
            logit_rows=torch.arange(count, device=device),
        )
        slots = torch.zeros(count, dtype=torch.int32, device=device)
        drawn = torch.full((count,), -1, dtype=torch.int64, device=device)
        recorded = _Recorded(batch, slots, drawn, _not_yet, self._model.held_by(batch))
        self._fill(recorded, rows)  # the first run, unrecorded, writes to the places that the step itself will write to
        self._chooser.prepare(kind)

        def body() -> None:
            logits = self._model.run(batch, self._kv)
            self._chooser.sample(logits, slots, drawn, kind=kind)
            places = (batch.tokens, batch.positions, batch.slots, batch.kv_lengths)
            advance(drawn, *places, batch.pages, self._kv.page_size)

        recorded.repeat = self._recorder.record(lambda: _ignore(self._model.run(batch, self._kv)), body)
        return recorded

    def _fill(self, recorded: _Recorded, rows: Sequence[Row]) -> None:
        size, upload, batch = self._kv.page_size, self._recorder.upload, recorded.batch
        upload([row.token for row in rows], batch.tokens)
        upload([row.length + row.shift for row in rows], batch.positions)
        upload([row.pages[row.length // size] * size + row.length % size for row in rows], batch.slots)
        upload([row.length + 1 for row in rows], batch.kv_lengths)
        upload([row.slot for row in rows], recorded.slots)
        self._fill_pages(recorded, rows)

    def _fill_pages(self, recorded: _Recorded, rows: Sequence[Row]) -> None:
        width = recorded.batch.pages.shape[1]
        table = [page for row in rows for page in [*row.pages, *[0] * (width - len(row.pages))]]
        self._recorder.upload(table, recorded.batch.pages)
        self._pages = [[*row.pages] for row in rows]

    def _ropes(self, rope_length: int) -> tuple[int, ...]:
        """What the frequencies of a sequence depend on."""
        ropes = dict.fromkeys(layer.rope for layer in self._model.spec.layers)
        return tuple(rope.effective_length(rope_length) for rope in ropes)


def _not_yet() -> None:
    raise AssertionError("nothing is recorded yet")


def _ignore(_: object) -> None:
    return
