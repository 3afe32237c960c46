"""The branching record of a conversation: every message has one before it and any number after it.

A branch is a way from the start to a message nothing follows. Branch numbers stay as they are while branches grow:
a branch begins where it left an older one, and they count in the order in which they began. Knows no files, no models.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .checks import Wrong
from .steps import Add, Go, Grow, Name, Remove, Settle, Step
from .turn import ROLES, Turn

START = 0  # stands for the place before the first message


@dataclass(frozen=True, slots=True)
class Node:
    """A message in its place. `ids`: the tokens a reply was made of, where they are known."""

    id: int
    parent: int
    turn: Turn
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """One way through the conversation: it ends with message `leaf`, its own part begins with message `first`."""

    number: int
    name: str
    first: int
    leaf: int


class Tree:
    """Messages, where the conversation stands (`current`), and the names of branches. Changed by `take` alone."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.current = START
        self.names: dict[str, int] = {}
        self._after: dict[int, list[int]] = {START: []}
        self._next = 1

    @property
    def next_id(self) -> int:
        """An id that no message has had."""
        return self._next

    def after(self, id: int) -> tuple[int, ...]:
        """What follows a message, oldest first: its alternatives."""
        return tuple(self._after[id])

    def path(self, id: int | None = None) -> tuple[Node, ...]:
        """The messages from the first one to `id` (default: to where the conversation stands)."""
        id = self.current if id is None else id
        found = []
        while id != START:
            found.append(self.nodes[id])
            id = self.nodes[id].parent
        return tuple(reversed(found))

    def siblings(self, id: int) -> tuple[int, ...]:
        """A message and its alternatives, oldest first."""
        return tuple(self._after[self.nodes[id].parent])

    def latest(self, id: int) -> int:
        """The end of the way through `id` that takes the newest message at every fork."""
        while self._after[id]:
            id = self._after[id][-1]
        return id

    def branches(self) -> tuple[Branch, ...]:
        """All of them, numbered from 1."""
        found = sorted((self._first_own(id), id) for id in self.nodes if not self._after[id])
        names = {leaf: name for name, leaf in self.names.items()}
        return tuple(
            Branch(number, names.get(leaf, ""), first, leaf) for number, (first, leaf) in enumerate(found, start=1)
        )

    def take(self, step: Step) -> None:
        """Let `step` happen. Raises Wrong, with nothing changed, if it cannot."""
        if isinstance(step, Add):
            self._add(step)
        elif isinstance(step, Grow):
            node = self._node(step.id)
            if not isinstance(step.text, str):
                raise Wrong("the text of a reply is not text")
            turn = replace(node.turn, content=node.turn.content + step.text)
            self.nodes[step.id] = replace(node, turn=turn, ids=node.ids + step.ids)
        elif isinstance(step, Settle):
            node = self._node(step.id)
            turn = Turn(node.turn.role, step.content, step.meta)
            self.nodes[step.id] = replace(node, turn=turn, ids=step.ids)
        elif isinstance(step, Go):
            if step.id != START:
                self._node(step.id)
            self.current = step.id
        elif isinstance(step, Remove):
            self._remove(step.id)
        elif isinstance(step, Name):
            self._name(step)
        else:
            raise Wrong(f"a step {type(step).__name__.lower()} is not about messages")

    def _node(self, id: int) -> Node:
        if id not in self.nodes:
            raise Wrong(f"there is no message with the id {id}")
        return self.nodes[id]

    def _add(self, step: Add) -> None:
        if step.id in self.nodes or step.id == START:
            raise Wrong(f"there are two messages with the id {step.id}")
        before = ROLES[1] if step.parent == START else self._node(step.parent).turn.role
        if step.role not in ROLES:
            raise Wrong(f"message {step.id} has the role {step.role!r:.40}")
        if step.role == before:
            raise Wrong(f"message {step.id} is by the {step.role}, and so is the one before it")
        self.nodes[step.id] = Node(step.id, step.parent, Turn(step.role, step.content, step.meta), step.ids)
        # A branch grows and takes its name along: names stand at ends.
        self.names = {name: step.id if at == step.parent else at for name, at in self.names.items()}
        self._after[step.parent].append(step.id)
        self._after[step.id] = []
        self.current, self._next = step.id, max(self._next, step.id + 1)

    def _remove(self, id: int) -> None:
        parent = self._node(id).parent
        gone = set(self._below(id))
        self._after[parent].remove(id)
        shorter = parent != START and not self._after[parent]  # the branch is still there, and so is its name
        moved = {name: parent if at in gone else at for name, at in self.names.items() if shorter or at not in gone}
        self.names = moved
        for inner in gone:
            del self.nodes[inner], self._after[inner]
        if self.current in gone:
            self.current = parent

    def _name(self, step: Name) -> None:
        self._node(step.id)
        if self._after[step.id]:
            raise Wrong(f"no branch ends with message {step.id}")
        self.names = {name: at for name, at in self.names.items() if at != step.id and name != step.name}
        if step.name:
            self.names[step.name] = step.id

    def _below(self, id: int) -> Iterator[int]:
        waiting = [id]
        while waiting:
            yield (id := waiting.pop())
            waiting += self._after[id]

    def _first_own(self, id: int) -> int:
        while id != START and self._after[self.nodes[id].parent][0] == id:
            id = self.nodes[id].parent
        return id
