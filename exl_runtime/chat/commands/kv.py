"""Commands about the keys and values of a conversation as a file, so that going on with it later costs no time."""

import os
from pathlib import Path

from ...console.terminal import clean_line
from ...errors import UsageError
from .. import status
from ..kv import kv_path
from .base import Command, Conversation

GROUP = "files"


def _kv(chat: Conversation, rest: str) -> None:
    word, _, name = rest.partition(" ")
    word, name = word.lower(), name.strip()
    if not word:
        _show(chat)
    elif word in ACTIONS:
        ACTIONS[word](chat, name)
    else:
        raise UsageError(
            f"{word!r:.40} is nothing to do with keys and values", hint="/kv save, load, drop, auto on|off"
        )


def _save(chat: Conversation, name: str) -> None:
    path = _path(chat, name)
    size = chat.session.kv.size()
    chat.screen.notice(f"writing keys and values of {status.count(size.tokens)} tokens, {status.size(size.nbytes)} …")
    if chat.session.file is None or not chat.session.file.exists() or path != chat.session.file:
        chat.session.save(path)  # a snapshot alone would be of no use
    size = chat.session.kv.save(path)
    chat.screen.notice(f"wrote {status.size(size.nbytes)} to {clean_line(str(kv_path(path)))}")


def _load(chat: Conversation, name: str) -> None:
    path = _path(chat, name)
    if not kv_path(path).is_file():
        raise UsageError(f"there is no {clean_line(str(kv_path(path)))}", hint="/kv save writes one")
    chat.screen.notice(loaded(chat.session.kv.open(path)))


def _drop(chat: Conversation, name: str) -> None:
    path = _path(chat, name)
    freed = chat.session.kv.drop(path)
    if not freed:
        raise UsageError(f"there is no {clean_line(str(kv_path(path)))}")
    chat.screen.notice(f"keys and values are gone from the disk: {status.size(freed)} freed")


def _auto(chat: Conversation, name: str) -> None:
    if name.lower() not in ("on", "off"):
        raise UsageError("on or off?", hint="/kv auto on writes them whenever a kept conversation is left")
    chat.session.kv.auto = chat.auto_kv = name.lower() == "on"
    if not chat.session.kv.auto:
        chat.screen.notice("keys and values are written only when you say /kv save")
    else:
        chat.screen.notice("keys and values are written whenever a kept conversation is left")


ACTIONS = {"save": _save, "load": _load, "drop": _drop, "auto": _auto}


def _show(chat: Conversation) -> None:
    kv, path = chat.session.kv, chat.session.file or chat.file
    size = kv.size()
    rows = [("in the cache", f"{status.count(size.tokens)} tokens, {status.size(size.nbytes)} as a file")]
    if path is not None:
        there = kv_path(path)
        rows.append(("on the disk", status.size(there.stat().st_size) if there.is_file() else "nothing"))
    rows.append(("written by itself", "when the conversation is left" if kv.auto else "no (/kv auto on)"))
    chat.screen.table(rows)


def loaded(tokens: int) -> str:
    """What a snapshot is good for, in a line."""
    return f"keys and values of {status.count(tokens)} tokens were kept: they need not be computed"


def _path(chat: Conversation, name: str) -> Path:
    if name:
        return Path(os.path.expanduser(name.strip("\"'")))
    path = chat.session.file or (None if chat.left_file else chat.file)
    if path is None:
        raise UsageError("beside which file?", hint="for example /kv save talk.json, which saves the conversation too")
    return path


COMMANDS = (
    Command(
        "kv",
        "/kv [save | load | drop [FILE] | auto on|off]",
        "keep what was computed beside the conversation: reopened, it goes on at once",
        GROUP,
        _kv,
    ),
)
