"""Guesses ahead of the model: who gets how many, from where, and what was learned from the last ones.

The model checks all guesses of a request in one pass. At each place the request's own sampler draws, with the random
number of that place, from the model's own logits; the guess is accepted while it names the same token, and the first
draw that differs is the last of the pass. So every token is the one that would have been drawn without guesses, for
any sampler, and samplers never have to take anything back.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Many

from .drafting import Drafter
from .lookup import Memory, SuffixIndex
from .request import RequestState
from .scheduler import Chunk
from .sequence import Sequence
from .worth import Worth

BUDGET = 32  # guesses of one pass, over all requests: more would slow down those that guess badly


class Speculator:
    """`context`: most tokens of one sequence."""

    def __init__(self, drafter: Drafter | None, *, context: int) -> None:
        self.drafter = drafter
        self.memory = Memory()
        self.worth = Worth()
        self._context = context
        self._worthwhile = True

    def plan(self, running: Iterable[Sequence]) -> None:
        """Say in `wish` how many tokens each decoding sequence would guess, and in `draft` those known already."""
        decoding = [sequence for sequence in running if sequence.state is RequestState.DECODE]
        share = BUDGET // len(decoding) if decoding else 0
        self._worthwhile = self.drafter is not None and self.worth.allows(len(decoding))
        for sequence in decoding:
            sequence.draft, sequence.wish, sequence.pace = [], 0, None
            left = min(sequence.limit - len(sequence.generated), self._context - len(sequence.tokens)) - 1
            most = min(share, left)
            if most > 0 and sequence.request.speculate != "off" and sequence.shadow is None:
                self._wish(sequence, most)

    def fill(self, sequences: Many[Sequence]) -> None:
        """Cut every draft to the `room` it was given, and let the draft model write those that are its own."""
        drafting = []
        for sequence in sequences:
            del sequence.draft[sequence.room :]
            if sequence.pace is sequence.model_pace and sequence.room:
                drafting.append(sequence)
        if drafting and self.drafter is not None:
            self.drafter.draft(drafting)
            for sequence in drafting:
                if sequence.steering is not None:
                    sequence.draft = sequence.steering.fitting(sequence.draft)

    def follow(self, chunks: Many[Chunk]) -> None:
        """Let the draft model read what the model has read of prompts; what replies add it reads when it guesses."""
        if self.drafter is not None:
            several = [c for c in chunks if c.stop - c.start > 1 or c.sequence.placed is not None]
            self.drafter.follow(several)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended well and still holds its pages: keep of it what later guesses can use."""
        if sequence.request.speculate != "off":
            self.memory.add(sequence.generated)
        if self.drafter is not None and sequence.pages:  # who goes on from here finds both models' pages complete
            self.drafter.follow([Chunk(sequence, sequence.draft_length, sequence.kv_length)])

    def learn(self, sequence: Sequence, drafted: int, accepted: int, base: int) -> None:
        """Of `drafted` guesses behind `base` tokens the first `accepted` came true."""
        if sequence.pace is not None:
            sequence.pace.learn(drafted, accepted)
        sequence.draft_length = min(sequence.draft_length, base + accepted)

    def kind(self, decoding: Many[Sequence]) -> bool | None:
        """Whether the draft model guesses in the step at hand; None: guesses from the text are another matter."""
        paces = [(sequence.pace, sequence) for sequence in decoding if sequence.room]
        if self.drafter is None or any(pace is not sequence.model_pace for pace, sequence in paces):
            return None
        return bool(paces)

    def _wish(self, sequence: Sequence, most: int) -> None:
        mode, steering = sequence.request.speculate, sequence.steering
        if steering is not None and (forced := steering.forced()):
            sequence.draft = forced[:most]
        elif mode in ("auto", "ngram") and (allowed := min(most, sequence.lookup_pace.allow())):
            guess = self._found(sequence, allowed)
            sequence.draft = guess if steering is None else steering.fitting(guess)
            sequence.pace = sequence.lookup_pace if sequence.draft else None
        sequence.wish = len(sequence.draft)
        asked = mode == "draft" or (mode == "auto" and self._worthwhile)
        if not sequence.draft and asked and self.drafter is not None:
            sequence.wish = min(most, sequence.model_pace.allow())
            sequence.pace = sequence.model_pace

    def _found(self, sequence: Sequence, most: int) -> list[int]:
        tokens = sequence.tokens
        if sequence.index is None:
            sequence.index = SuffixIndex(tokens)
        else:
            sequence.index.extend(tokens[len(sequence.index.tokens) :])
        guess, agreement = sequence.index.find(tokens, most)
        other, better = self.memory.find(tokens, most)
        return other if better > agreement else guess
