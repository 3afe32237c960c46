"""Commands about branches: begin one, list them, go to one."""

from ...errors import UsageError
from .. import status
from ..tree import START
from .base import Command, Conversation

GROUP = "branches"


def _branch(chat: Conversation, rest: str) -> None:
    session = chat.session
    if rest and not rest.removeprefix("-").isdecimal():
        session.name_branch(rest)
        chat.screen.notice(f"this branch is called {rest}")
        return
    instead = session.undo(int(rest) if rest else -1)
    chat.screen.notice(
        f"what you say next begins a branch beside “{status.excerpt(instead.content)}” (/branches lists them)"
    )


def _branches(chat: Conversation, rest: str) -> None:
    tree = chat.session.tree
    branches = chat.session.branches
    if not branches:
        raise UsageError("nothing was said yet")
    rows = []
    for branch in branches:
        path = tree.path(branch.leaf)
        said = [node for node in path if node.turn.role == "user"]
        own = next((place for place, node in enumerate(path) if node.id == branch.first), 0)
        shared = sum(node.turn.role == "user" for node in path[:own])
        here = "*" if branch.leaf == tree.current else ""
        count = status.messages(len(said))
        what = count + (f", its own from number {shared}" if branch.first != START else "")
        if branch.first != START and path[own].turn.role == "assistant":
            what = f"{count}, another reply to number {shared - 1}"
        rows.append((f"{branch.number}{here}", branch.name, what, status.excerpt(chat.session.said(path[-1].turn), 40)))
    chat.screen.table(rows)
    if tree.current == START:
        chat.screen.notice("you are before the first message")
    elif tree.after(tree.current):
        number = sum(node.turn.role == "user" for node in tree.path()) - 1
        chat.screen.notice(f"you are after message {number}: what you say next begins another branch")


def _goto(chat: Conversation, rest: str) -> None:
    word = rest.lower()
    if not rest:
        raise UsageError("which branch?", hint="/goto N or NAME, /goto next, /goto prev; /branches lists them")
    if word in ("next", "prev", "previous"):
        place, count = chat.session.variant(1 if word == "next" else -1)
        chat.screen.notice(f"{place} of {count}")
    else:
        found = chat.session.goto(rest)
        chat.screen.notice(f"branch {found.number}{f' ({found.name})' if found.name else ''}")
    show_end(chat)


def show_end(chat: Conversation) -> None:
    """The last two messages, so that one knows where one is."""
    for turn in chat.session.turns[-2:]:
        chat.screen.notice(f"{turn.role}: {status.excerpt(chat.session.said(turn), 100)}")


COMMANDS = (
    Command(
        "branch",
        "/branch [N | NAME]",
        "go back to before message N to say something else; or name this branch",
        GROUP,
        _branch,
    ),
    Command("branches", "/branches", "list the branches of the conversation", GROUP, _branches),
    Command(
        "goto",
        "/goto N | NAME | next | prev",
        "go to a branch, or to another version of the last message",
        GROUP,
        _goto,
    ),
)
