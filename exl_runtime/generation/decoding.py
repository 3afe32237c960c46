"""Decoding without the host: which steps can run as recorded ones, and what the device is told about their sequences.

Beside `runner.py`, which takes every step this one does not. Knows no text.
"""

import logging
from collections.abc import Sequence as Many
from collections.abc import Set
from dataclasses import dataclass

from ..cache.storage import KVStorage
from ..model.graph import MOST_ROWS, DecodeGraphs, Recordable, Recorder, Row
from ..sampling.device import DeviceSampling, why_not
from ..sampling.sampler import Sampler
from .request import RequestState
from .scheduler import Chunk
from .sequence import Sequence

log = logging.getLogger(__name__)

HISTORY = 8192  # tokens that penalties with a range may look back on the device


@dataclass(slots=True)
class _Place:
    """A sequence's slot, and how many of its tokens the device believes are drawn; -1: it has to be told."""

    sequence: Sequence
    slot: int
    drawn: int


class Decoder:
    """Not thread-safe, as the engine around it."""

    def __init__(self, model: Recordable, kv: KVStorage, *, eos_ids: Set[int], recorder: Recorder) -> None:
        self.eos_ids = frozenset(eos_ids)
        self._sampling = DeviceSampling(
            slots=MOST_ROWS, vocab_size=model.spec.vocab_size, capacity=HISTORY, device=model.device
        )
        self._graphs = DecodeGraphs(model, kv, self._sampling, recorder)
        self._places: dict[int, _Place] = {}  # by Sequence.order
        self._reasons: set[str] = set()  # told already
        self.steps = 0  # taken

    def run(self, chunks: Many[Chunk]) -> list[int] | None:
        """The tokens drawn behind the chunks, or None: then the step has to run as usual, and nothing has happened."""
        why = self._why_not(chunks)
        if why is None:
            try:
                tokens = self._step(chunks)
            except Exception as err:  # it will be seen whether the step itself is at fault
                log.warning("a recorded step failed, running as usual: %s", err)
                self._stale()
                return None
            if min(tokens) >= 0:
                self.steps += 1
                return tokens
            why = "a row has no token that may be drawn"  # the usual way will say what is wrong with it
            self._stale()
        else:
            self._set_back()
        if why not in self._reasons:
            self._reasons.add(why)
            log.info("running as usual: %s", why)
        return None

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        if sequence.order in self._places:
            self._set_back()
            self._sampling.release(self._places.pop(sequence.order).slot)

    def _why_not(self, chunks: Many[Chunk]) -> str | None:
        if len(chunks) > MOST_ROWS:
            return f"{len(chunks)} sequences at once; recorded steps take up to {MOST_ROWS}"
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.state is not RequestState.DECODE or chunk.end - chunk.start != 1 or not chunk.wants_logits:
                return "a prompt or guesses are in the step"
            if sequence.steering is not None or sequence.shadow is not None or sequence.bans is not None:
                return "a constraint looks at the logits"
            if sequence.request.lora:
                return "an adapter changes the matrices"
            if sequence.scores_prompt:
                return "log-probabilities of the prompt are wanted"
            if type(sequence.sampler) is not Sampler:
                return "a sampler of somebody else's"
            params = sequence.sampler.params
            why = why_not(params, vocab_size=self._sampling.vocab_size, capacity=self._sampling.capacity)
            if why is not None:
                return why
        return self._graphs.refuses([self._row(chunk, 0) for chunk in chunks])

    def _step(self, chunks: Many[Chunk]) -> list[int]:
        orders = [chunk.sequence.order for chunk in chunks]
        if any(order not in self._places for order in orders):
            self._set_back()
            for chunk in chunks:
                self._admit(chunk.sequence, orders)
        rows = [self._row(chunk, self._places[chunk.sequence.order].slot) for chunk in chunks]
        if not self._graphs.continues(rows):
            self._set_back()
            for order in orders:
                self._tell(self._places[order])
        tokens = self._graphs.step(rows)
        for order in orders:
            self._places[order].drawn += 1
        return tokens

    def _admit(self, sequence: Sequence, wanted: Many[int]) -> None:
        if sequence.order in self._places:
            return
        if not self._sampling.room:
            leaves = next(order for order in self._places if order not in wanted)
            self._sampling.release(self._places.pop(leaves).slot)
        sampler = sequence.sampler
        slot = self._sampling.admit(
            sampler.params,
            seed=sampler.seed,
            eos_ids=self.eos_ids,
            prompt=sequence.prompt,
            generated=sequence.generated,
        )
        self._places[sequence.order] = _Place(sequence, slot, len(sequence.generated))

    def _tell(self, place: _Place) -> None:
        """Bring a slot up to date: tokens were drawn elsewhere, or drawn here and not used."""
        sequence = place.sequence
        if place.drawn != len(sequence.generated):
            self._sampling.restore(place.slot, prompt=sequence.prompt, generated=sequence.generated)
            place.drawn = len(sequence.generated)

    def _set_back(self) -> None:
        """No step is ahead any more; the slots it moved are to be told where they are."""
        ahead = self._graphs.drop()
        for place in self._places.values():
            if place.slot in ahead:
                place.drawn = -1

    def _stale(self) -> None:
        """What the device believes of any sequence is in doubt."""
        self._graphs.drop()
        for place in self._places.values():
            place.drawn = -1

    @staticmethod
    def _row(chunk: Chunk, slot: int) -> Row:
        sequence = chunk.sequence
        return Row(
            owner=sequence.order,
            token=sequence.tokens[chunk.start],
            length=chunk.start,
            pages=sequence.pages,
            rope_length=sequence.rope_length,
            slot=slot,
            shift=sequence.shift,
        )
