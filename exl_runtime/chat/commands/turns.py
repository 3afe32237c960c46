"""Commands about messages: make again, go on, change, take back, remove, list."""

from ...errors import UsageError
from .. import status
from .base import Command, Conversation, number_and_text

GROUP = "turns"


def _regen(chat: Conversation, rest: str) -> None:
    number, extra = number_and_text(rest)
    if extra:
        raise UsageError(f"{extra!r:.60} is no message number", hint="/regen N; /turns lists the numbers")
    sampling = chat.session.settings.sampling
    events = chat.session.stream_regenerate(-1 if number is None else number)
    if sampling.greedy or sampling.seed is not None:
        why = "temperature 0 always takes the best token" if sampling.greedy else f"the seed is fixed ({sampling.seed})"
        chat.screen.notice(f"{why}: with the same settings the reply will be the same")
    if chat.reply(events):
        _say_variant(chat)


def _say_variant(chat: Conversation) -> None:
    tree = chat.session.tree
    among = tree.siblings(tree.current)
    if len(among) > 1:
        place = among.index(tree.current) + 1
        chat.screen.notice(f"reply {place} of {len(among)}: /goto prev and /goto next turn the pages")


def _continue(chat: Conversation, rest: str) -> None:
    events = chat.session.stream_extend()  # refuses where there is nothing to go on with
    chat.reply(events, begun=chat.session.tree.path()[-1])


def _undo(chat: Conversation, rest: str) -> None:
    taken = chat.session.undo()
    chat.screen.notice(f"taken back: {status.excerpt(taken.content)} (/branches lists what was said)")


def _delete(chat: Conversation, rest: str) -> None:
    kind, _, which = rest.partition(" ")
    if kind.lower() == "branch":
        found = chat.session.delete_branch(which)
        chat.screen.notice(f"branch {found.number} is gone; what it shared with others stays")
        return
    number, extra = number_and_text(rest)
    if extra:
        raise UsageError(f"{extra!r:.60} is no message number", hint="/delete N, or /delete branch N")
    gone = chat.session.delete(-1 if number is None else number)
    chat.screen.notice(f"gone for good, with all that followed: {status.excerpt(gone.content)}")


def _edit(chat: Conversation, rest: str) -> None:
    word, _, behind = rest.partition(" ")
    if word.lower() == "reply":
        _edit_reply(chat, behind.strip())
        return
    number, text = number_and_text(rest)
    index = -1 if number is None else number
    if text:
        chat.reply(chat.session.stream_edit(index, text))
        return
    said = [turn for turn in chat.session.turns if turn.role == "user"]
    content = _at(said, index)
    _offer(chat, content, "/edit N new text; /turns lists the numbers")
    chat.draft_takes = lambda changed: chat.reply(chat.session.stream_edit(index, changed))
    chat.screen.notice("change the message and press Enter; what followed stays as another branch")


def _edit_reply(chat: Conversation, rest: str) -> None:
    number, text = number_and_text(rest)
    index = -1 if number is None else number
    if text:
        _take_reply(chat, index, text)
        return
    replies = [turn for turn in chat.session.turns if turn.role == "assistant"]
    content = _at(replies, index)
    _offer(chat, content, "/edit reply N new text; /turns lists the numbers")
    chat.draft_takes = lambda changed: _take_reply(chat, index, changed)
    chat.screen.notice("change the reply and press Enter; the one before stays as another branch")


def _take_reply(chat: Conversation, index: int, text: str) -> None:
    chat.session.edit_reply(index, text)
    chat.screen.notice("the reply is changed: go on talking, or /continue lets the model go on with it")


def _at(turns: list, index: int) -> str:
    if not turns or not -len(turns) <= index < len(turns):
        raise UsageError(f"there is no message {index}", hint="/turns lists the messages with their numbers")
    return turns[index].content


def _offer(chat: Conversation, content: str, hint: str) -> None:
    if not chat.can_draft:
        raise UsageError("say what the message should be", hint=hint)
    chat.draft = f"/{content}" if content.startswith("/") else content  # or it would be a command


def _turns(chat: Conversation, rest: str) -> None:
    tree = chat.session.tree
    rows, number = [], 0
    left = len(chat.session.forgotten)
    for place, node in enumerate(tree.path()):
        label = str(number) if node.turn.role == "user" else ""
        number += node.turn.role == "user"
        among = tree.siblings(node.id)
        notes = [f"{among.index(node.id) + 1} of {len(among)}"] if len(among) > 1 else []
        notes += ["no longer seen by the model"] if place < left else []
        rows.append((label, node.turn.role, ", ".join(notes), status.excerpt(chat.session.said(node.turn), 60)))
    if not rows:
        raise UsageError("nothing was said yet")
    chat.screen.table(rows)


def _clear(chat: Conversation, rest: str) -> None:
    if chat.keep:
        chat.leave()
    chat.session.clear()
    chat.last, chat.left_file = None, chat.file is not None
    chat.start_keeping()
    chat.screen.notice("a new conversation; system prompt and settings stay")


COMMANDS = (
    Command(
        "regen",
        "/regen [N]",
        "make the reply to the last message, or to number N, again",
        GROUP,
        _regen,
        ("regenerate", "retry", "r"),
    ),
    Command("continue", "/continue", "let the model go on with its last reply", GROUP, _continue, ("cont",)),
    Command(
        "edit", "/edit [reply] [N] [TEXT]", "change a message, or a reply (the last, or number N)", GROUP, _edit, ("e",)
    ),
    Command("undo", "/undo", "go back to before the last message; it stays as a branch", GROUP, _undo),
    Command(
        "delete",
        "/delete [N | branch B]",
        "remove a message with all that followed, or a branch",
        GROUP,
        _delete,
        ("del",),
    ),
    Command("turns", "/turns", "list the messages with their numbers", GROUP, _turns),
    Command("clear", "/clear", "start a new conversation", GROUP, _clear, ("new", "reset")),
)
