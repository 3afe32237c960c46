"""What a command is, and what it acts on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ExlError
from ...generation.request import Result
from ...generation.stream import Event
from .. import store
from ..converse import show_reply
from ..screen import Screen
from ..session import ChatSession
from ..tree import Node

if TYPE_CHECKING:
    from ...runtime import Runtime


@dataclass(slots=True)
class Conversation:
    """What commands act on.

    file, left_file    saved to or loaded from last; whether the conversation in it was cleared away
    keep               conversations are kept in the user's folder by themselves
    auto_kv            ... with their keys and values
    draft, draft_takes goes on the next input line, and what becomes of the line that comes back
    attached           files that go along with the next message: (name, text)
    wants_editor       the text to open the user's editor with, outside of the reply's terminal mode
    open_model         opens a model by its name or folder, for /model; None: there is no other
    """

    session: ChatSession
    screen: Screen
    can_draft: bool = False
    file: Path | None = None
    left_file: bool = False
    keep: bool = False
    auto_kv: bool = False
    draft: str = ""
    draft_takes: Callable[[str], object] | None = None
    attached: list[tuple[str, str]] = field(default_factory=list)
    wants_editor: str | None = None
    open_model: "Callable[[str], Runtime] | None" = None
    done: bool = False
    last: Result | None = None
    interrupted: bool = False  # the last reply was stopped with Ctrl-C

    def reply(self, events: Iterator[Event], *, begun: Node | None = None) -> bool:
        """Show a reply with its status line; whether there was one. begun: the reply that goes on."""
        result, self.interrupted = show_reply(self.session, events, self.screen, begun)
        self.last = result or self.last
        return result is not None

    def say(self, text: str) -> None:
        """Send a message, with the files that were attached."""
        whole = "\n\n".join([*(fenced(name, content) for name, content in self.attached), text])
        if self.reply(self.session.stream(whole)):
            self.attached.clear()

    def take(self, session: ChatSession) -> None:
        """Leave the present conversation for another."""
        self.leave()
        self.session, self.last, self.draft, self.draft_takes = session, None, "", None
        session.kv.auto = self.auto_kv
        self.start_keeping()

    def start_keeping(self) -> None:
        """Keep the conversation from its next message on, unless it is kept already."""
        if self.keep and self.session.file is None:
            self.session.keep(store.new_path())

    def leave(self) -> None:
        """Bring the kept file up to date; one without messages goes away."""
        try:
            self.session.close(discard=self.keep and not self.session.tree.nodes)
        except ExlError as err:
            self.screen.warning(str(err))


@dataclass(frozen=True, slots=True)
class Command:
    """`run` gets the conversation and the text behind the name, without blanks around it."""

    name: str
    usage: str
    help: str
    group: str
    run: Callable[[Conversation, str], None]
    aliases: tuple[str, ...] = ()


def fenced(name: str, content: str) -> str:
    """A file as part of a message: its name, and its text in a fence that nothing in it can close."""
    longest = max((len(run) for run in _runs(content, "`")), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{name}:\n{fence}\n{content.rstrip()}\n{fence}"


def _runs(text: str, char: str) -> Iterator[str]:
    start = text.find(char)
    while start >= 0:
        end = start
        while end < len(text) and text[end] == char:
            end += 1
        yield text[start:end]
        start = text.find(char, end)


def number_and_text(rest: str) -> tuple[int | None, str]:
    """`rest` cut into a leading whole number, if there is one, and what follows."""
    first, _, text = rest.partition(" ")
    try:
        return int(first), text.strip()
    except ValueError:
        return None, rest
