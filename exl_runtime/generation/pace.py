"""How far to guess ahead: longer while guesses come true, shorter when not, and for a while not at all."""

from dataclasses import dataclass

FIRST = 4.0
MOST = 16
GROWTH, SHRINKAGE = 1.5, 0.65
MEMORY = 0.7  # weight of the past in the share of guesses that came true
POOR = 0.2  # below this share guessing pauses
PAUSES = (4, 64)  # tokens: the first pause, and the longest; each is twice the one before


@dataclass(slots=True)
class Pace:
    """Of one request and one source of guesses. Lengths in tokens."""

    length: float = FIRST
    share: float = 0.5
    pause: int = 0  # tokens left of this pause
    next_pause: int = PAUSES[0]

    def allow(self) -> int:
        """Tokens to guess now; to be asked once per step."""
        if self.pause:
            self.pause -= 1
            return 0
        return int(self.length)

    def learn(self, drafted: int, accepted: int) -> None:
        """So many of the guessed tokens came true."""
        if not drafted:
            return
        self.share = MEMORY * self.share + (1 - MEMORY) * accepted / drafted
        if accepted == drafted:
            self.length = min(MOST, self.length * GROWTH)
            self.next_pause = PAUSES[0]
        else:
            self.length = max(2.0, self.length * SHRINKAGE)
        if self.share < POOR:
            self.pause, self.next_pause = self.next_pause, min(PAUSES[1], 2 * self.next_pause)
            self.share = 0.5
            self.length = 2.0
