"""Moving about in a conversation: messages and branches, back and forth. What a session can do without a model."""

from ..errors import UsageError
from .record import Record
from .steps import Go, Name, Remove
from .tree import START, Branch, Node, Tree
from .turn import Turn

MAKING = "another reply of this chat is still being made"


class Branching:
    """The part of a session that needs no model. Messages of the user count from 0 along the present branch."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._left = 0  # oldest turns that no longer fit the context; they are shown, but not sent
        self._making = False
        self.named = 0  # messages that a window has left behind, and that a screen has named

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All messages of both sides along the present branch, oldest first."""
        return tuple(node.turn for node in self.tree.path())

    @property
    def tree(self) -> Tree:
        """All messages of all branches, to look at."""
        return self._record.tree

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The ways this conversation went, numbered from 1 in the order in which they began."""
        return self.tree.branches()

    @property
    def forgotten(self) -> tuple[Turn, ...]:
        """The oldest turns that left the context: the model no longer sees them."""
        return self.turns[: self._left]

    @property
    def making(self) -> bool:
        """True while a reply is being made."""
        return self._making

    def undo(self, index: int = -1) -> Turn:
        """Go back to before message `index`, and return it. It stays, with all that followed, as a branch."""
        self._check_idle()
        node = self._user_node(index)
        self._go(node.parent)
        return node.turn

    def goto(self, branch: int | str) -> Branch:
        """Go to the end of a branch, by its number or name. Raises UsageError when there is none."""
        self._check_idle()
        found = self._branch(branch)
        self._go(found.leaf)
        return found

    def variant(self, offset: int) -> tuple[int, int]:
        """Turn to the next (1) or previous (-1) of the last message's alternatives: (its number from 1, how many)."""
        self._check_idle()
        if not self.tree.path():
            raise UsageError("nothing was said yet")
        all_ = self.tree.siblings(self.tree.current)
        place = (all_.index(self.tree.current) + offset) % len(all_)
        self._go(self.tree.latest(all_[place]))
        return place + 1, len(all_)

    def name_branch(self, name: str, branch: int | str | None = None) -> None:
        """Name a branch (default: the one that ends here). Raises UsageError: no words, a number, no branch."""
        self._check_idle()
        name = checked(name, "a name").strip()
        if not name or name.isdecimal() or "\n" in name:
            raise UsageError(f"{name!r:.60} is no name for a branch", hint="numbers are taken; use a word or two")
        at = self.tree.current if branch is None else self._branch(branch).leaf
        if at == START or self.tree.after(at):
            raise UsageError("no branch ends here", hint="say something first, or go to the end of one")
        self._record.do(Name(at, name))

    def delete(self, index: int = -1) -> Turn:
        """Remove message `index` and everything that followed it, in all branches; returns the message."""
        self._check_idle()
        node = self._user_node(index)
        self._record.do(Remove(node.id))
        self._left = 0
        self._removed()
        return node.turn

    def delete_branch(self, branch: int | str) -> Branch:
        """Remove what a branch has for itself; what others share stays. Raises UsageError when there is none."""
        self._check_idle()
        found = self._branch(branch)
        own = found.leaf
        while (parent := self.tree.nodes[own].parent) != START and len(self.tree.after(parent)) == 1:
            own = parent
        self._record.do(Remove(own))
        self._left = 0
        self._removed()
        return found

    def clear(self) -> None:
        """Forget the conversation with all its branches; system prompt and settings stay."""
        self._check_idle()
        for id in self.tree.after(START):
            self._record.do(Remove(id))
        self._left = 0
        self._removed()

    def _removed(self) -> None:
        """Something was deleted for good."""

    def _user_node(self, index: int) -> Node:
        nodes = [node for node in self.tree.path() if node.turn.role == "user"]
        if not nodes:
            raise UsageError("nothing was said yet")
        if isinstance(index, bool) or not isinstance(index, int) or not -len(nodes) <= index < len(nodes):
            raise UsageError(
                f"there is no message {index!r} of the user", hint=f"the conversation has 0 to {len(nodes) - 1}"
            )
        return nodes[index]

    def _branch(self, branch: int | str) -> Branch:
        wanted = str(branch).strip()
        for found in self.branches:
            if wanted in (str(found.number), found.name):
                return found
        raise UsageError(f"there is no branch {wanted!r:.60}", hint="/branches lists them")

    def _go(self, id: int) -> None:
        self._record.do(Go(id))
        self._left = 0

    def _check_idle(self) -> None:
        if self._making:
            raise UsageError(MAKING, hint="finish or close its stream first")


def checked(text: str, what: str) -> str:
    """`text`, if it can be a part of a conversation. Raises UsageError."""
    if not isinstance(text, str):
        raise UsageError(f"{what} must be text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise UsageError(f"{what} holds half a character (a lone surrogate)") from err
    return text
