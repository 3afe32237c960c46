"""Whether a draft model is worth its time: tokens per second with it and without it, measured as the steps go by.

A step with guesses gives more tokens and takes longer. After a trial with guesses a few steps run without; the slower
way is left for a while. What is generated is the same either way. Times are taken per number of replies in progress,
as both models take longer for more of them.
"""

import logging
from dataclasses import dataclass, field
from statistics import median

log = logging.getLogger(__name__)

TRIAL = 24  # steps with guesses before they are judged; the first ones of a reply are not typical
PLAIN = 6  # steps without, to compare with
AGAIN = 1024  # steps with guesses after which the comparison is made anew
PAUSES = (128, 4096)  # steps without guesses: the first pause, and the longest; each is twice the one before
MARGIN = 0.97  # guesses may be so much slower before they pause: they are not given up for noise


@dataclass(slots=True)
class Rate:
    """Tokens and seconds of some steps. By the median step: a machine busy with other things says nothing."""

    tokens: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds.append(seconds)

    @property
    def steps(self) -> int:
        return len(self.seconds)

    @property
    def per_second(self) -> float:
        return self.tokens / len(self.seconds) / max(median(self.seconds), 1e-9)


@dataclass(slots=True)
class _Trial:
    guessed: Rate = field(default_factory=Rate)
    plain: Rate = field(default_factory=Rate)
    pause: int = 0  # steps left of it
    next_pause: int = PAUSES[0]
    judged: bool = False


class Worth:
    """`allows(count)` before a step over `count` replies, `observe` after it."""

    def __init__(self) -> None:
        self._trials: dict[int, _Trial] = {}
        self._told = False

    def allows(self, count: int) -> bool:
        """Whether the draft model may guess in the next step."""
        trial = self._trials.setdefault(count, _Trial())
        return trial.pause == 0 and (trial.judged or trial.guessed.steps < TRIAL)

    def observe(self, count: int, *, guessed: bool, tokens: int, seconds: float) -> None:
        """A step over `count` replies and no prompt gave `tokens` tokens; `guessed`: the draft model took part."""
        trial = self._trials.setdefault(count, _Trial())
        if trial.pause and not guessed:
            trial.pause -= 1
            if not trial.pause:
                self._trials[count] = _Trial(next_pause=trial.next_pause)
            return
        (trial.guessed if guessed else trial.plain).add(tokens, seconds)
        if trial.judged:
            if trial.guessed.steps >= AGAIN:
                self._trials[count] = _Trial(next_pause=trial.next_pause)
        elif trial.guessed.steps >= TRIAL and trial.plain.steps >= PLAIN:
            self._judge(trial)

    def _judge(self, trial: _Trial) -> None:
        guessed, plain = trial.guessed.per_second, trial.plain.per_second
        if guessed >= MARGIN * plain:
            trial.judged, trial.next_pause = True, PAUSES[0]
            return
        trial.pause, trial.next_pause = trial.next_pause, min(PAUSES[1], 2 * trial.next_pause)
        if not self._told:
            self._told = True
            log.warning("the draft model slows replies down (%.1f to %.1f tokens/s): it pauses", plain, guessed)
