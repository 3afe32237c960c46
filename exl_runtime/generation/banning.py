"""Strings that must not appear: finds them across tokens, and holds text back while one could still begin in it.

Works on what each token adds to the text; which token is to blame is said as an index, what to do about it is not
decided here. Case does not count, where a letter has one upper and one lower form.
"""

from collections.abc import Iterable

from .stops import held_back


class Bans:
    """`pending`: the texts of the latest tokens, from the first that a banned string could still begin in."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(fold(string) for string in strings)
        self.pending: list[str] = []

    def push(self, text: str) -> int | None:
        """One more token, which added `text`. The index in `pending` of the token in which a banned string begins that
        is now complete; None if there is none."""
        self.pending.append(text)
        window = fold("".join(self.pending))
        starts = [start for string in self._strings if (start := window.find(string)) >= 0]
        if not starts:
            return None
        index, end = 0, len(self.pending[0])
        while end <= min(starts):
            index += 1
            end += len(self.pending[index])
        # Tokens that showed nothing yet hold the first bytes of what came out later.
        while index and not self.pending[index - 1]:
            index -= 1
        return index

    def release(self) -> list[str]:
        """The texts of the tokens that no banned string can begin in any more; they leave `pending`."""
        window = fold("".join(self.pending))
        safe = len(window) - held_back(window, self._strings)
        count, end = 0, 0
        for piece in self.pending:
            end += len(piece)
            if end > safe:
                break
            count += 1
        while count and not self.pending[count - 1]:
            count -= 1
        return self._take(count)

    def flush(self) -> list[str]:
        """Everything: no token follows."""
        return self._take(len(self.pending))

    def _take(self, count: int) -> list[str]:
        taken, self.pending = self.pending[:count], self.pending[count:]
        return taken


def fold(text: str) -> str:
    """Lower case, character by character, so that places stay the same."""
    return "".join(lower if len(lower := char.lower()) == 1 else char for char in text)
