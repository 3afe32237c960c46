"""Commands about conversations as files: save, load, list, search, export, copy."""

import os
import time
from pathlib import Path

from ...console.terminal import clean_line
from ...errors import UsageError
from .. import clipboard, history, status, store
from ..blocks import code_blocks
from ..export import FORMATS, export
from ..session import ChatSession
from .base import Command, Conversation
from .branches import show_end
from .kv import loaded

GROUP = "files"
HITS = 20  # that /search shows


def _save(chat: Conversation, rest: str) -> None:
    if chat.left_file and not rest:  # it would write over the conversation that was left
        raise UsageError("which file? this is a new conversation", hint=f"the one before is in {chat.file}")
    path = _path(chat, rest)
    chat.session.save(path)
    chat.file, chat.left_file = path, False
    chat.screen.notice(f"saved {status.messages(len(chat.session.turns))} to {path}")


def _load(chat: Conversation, rest: str) -> None:
    known = None if not rest or Path(rest).exists() else store.find(rest)
    if known is None:
        path = _path(chat, rest)
        chat.take(ChatSession.load(path, chat.session.runtime))
        chat.file, chat.left_file = path, False
    elif chat.session.file is not None and chat.session.file.samefile(known):
        raise UsageError("this is the conversation you are in")
    else:
        path = known
        chat.take(ChatSession.resume(path, chat.session.runtime))
        chat.file, chat.left_file = None, False
    show_loaded(chat, path)


def show_loaded(chat: Conversation, path: Path) -> None:
    """What was loaded, and how it ended."""
    turns = chat.session.turns
    chat.screen.notice(f"loaded {len(turns)} messages, with their system prompt and settings, from {path}")
    if problem := chat.session.kv.told():
        chat.screen.warning(problem.problem)
    elif chat.session.kv.loaded:
        chat.screen.notice(loaded(chat.session.kv.loaded))
    if len(branches := chat.session.branches) > 1:
        chat.screen.notice(f"the conversation has {len(branches)} branches (/branches)")
    show_end(chat)
    if turns and turns[-1].role == "user":
        chat.screen.notice("the last message got no reply: /regen makes one")
    elif turns and turns[-1].meta is None and chat.session.tree.path()[-1].ids:
        chat.screen.notice("the last reply was cut off: /continue goes on with it")


def _path(chat: Conversation, rest: str) -> Path:
    if rest:
        return Path(os.path.expanduser(rest.strip("\"'")))
    if chat.file is None:
        raise UsageError("which file?", hint="for example /save talk.json, and later /load talk.json")
    return chat.file


def _list(chat: Conversation, rest: str) -> None:
    chats = store.stored()
    if not chats:
        raise UsageError("no conversation is kept yet", hint=f"they are kept in {store.chats_dir()}")
    rows = [rows_of(one) for one in chats]
    if chat.session.file is not None:
        rows = [
            (f"{row[0]}*" if one.path == chat.session.file else row[0], *row[1:])
            for one, row in zip(chats, rows, strict=True)
        ]
    chat.screen.table(rows)
    chat.screen.notice("/load N goes on with one; /search WORDS looks into all of them")


def rows_of(chat: store.Stored) -> tuple[str, str, str]:
    """A line of the list: number, how it began, the rest."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(chat.changed))
    if chat.problem:
        return str(chat.number), status.excerpt(chat.problem, 60), when
    about = f"{when}, {status.messages(chat.messages)}, {clean_line(chat.model, 30)}"
    return str(chat.number), status.excerpt(chat.title, 44) or "(nothing said)", about


def _search(chat: Conversation, rest: str) -> None:
    if not rest:
        raise UsageError("which words?", hint="/search WORDS finds messages that hold all of them")
    rows = [(str(hit.stored.number), hit.excerpt, hit.role) for hit in store.search(rest.split(), store.stored())]
    if not rows:
        raise UsageError(f"no message holds {rest!r:.60}")
    chat.screen.table(rows[:HITS])
    more = f"; {len(rows) - HITS} more" if len(rows) > HITS else ""
    chat.screen.notice(f"{len(rows)} found{more}; /load N opens the conversation with that number")


def _export(chat: Conversation, rest: str) -> None:
    kind, _, name = rest.partition(" ")
    kind = kind.lower()
    if kind not in FORMATS:
        raise UsageError(f"{kind!r:.40} is no format to write", hint=f"/export {'|'.join(FORMATS)} [FILE]")
    session = chat.session
    if not session.turns:
        raise UsageError("nothing was said yet")
    path = Path(os.path.expanduser(name.strip().strip("\"'"))) if name.strip() else _new_name(kind)
    if path.exists():
        raise UsageError(f"{clean_line(str(path))} exists", hint="choose another name, or remove it")
    text = export(
        kind,
        session.turns,
        system=session.system,
        model=session.runtime.info.name,
        settings=session.settings.to_json(),
        parts=session.voice.parts,
    )
    history.write_private(path, text.encode("utf-8", "replace"))
    chat.screen.notice(f"wrote {status.messages(len(session.turns))} to {path}")


def _new_name(kind: str) -> Path:
    base = time.strftime("chat-%Y-%m-%d")
    names = [f"{base}.{kind}", *(f"{base}-{number}.{kind}" for number in range(2, 1000))]
    return next((Path(name) for name in names if not Path(name).exists()), Path(names[0]))


def _copy(chat: Conversation, rest: str) -> None:
    replies = [chat.session.said(turn) for turn in chat.session.turns if turn.role == "assistant"]
    if not replies:
        raise UsageError("there is no reply to copy")
    text, what = replies[-1], "the reply"
    if rest:
        blocks = code_blocks(text)
        if not rest.isdecimal() or not 1 <= int(rest) <= len(blocks):
            raise UsageError(f"there is no code block {rest}", hint=f"the last reply has {len(blocks)}")
        text, what = blocks[int(rest) - 1], f"code block {rest}"
    sent, taken = chat.screen.copy(text), clipboard.offer(text)
    if not (sent or taken):
        raise UsageError("this terminal has no clipboard that could be reached", hint="/save writes a file")
    how = f" with {taken}" if taken else ", if the terminal allows it"
    chat.screen.notice(f"copied {what} ({len(text)} characters){how}")


COMMANDS = (
    Command("save", "/save [FILE]", "write the conversation to a file", GROUP, _save),
    Command("load", "/load [FILE | N]", "go on with a saved conversation, or with number N of /list", GROUP, _load),
    Command("list", "/list", "the conversations that were kept by themselves", GROUP, _list, ("ls",)),
    Command("search", "/search WORDS", "find messages in all kept conversations", GROUP, _search, ("find",)),
    Command(
        "export", "/export md|json|html [FILE]", "write the present branch for other programs or people", GROUP, _export
    ),
    Command("copy", "/copy [N]", "copy the last reply, or its code block N", GROUP, _copy),
)
