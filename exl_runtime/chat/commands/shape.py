"""Commands about what a reply has to look like: JSON, a grammar, a pattern, a choice."""

import os
import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ...errors import UsageError
from ...generation.grammar import Grammar
from .. import status
from ..settings import THOUGHTS
from .base import Command, Conversation
from .prompt import text_of

GROUP = "model"
NONE = ("none", "off")


def _json(chat: Conversation, rest: str) -> None:
    if not rest:
        _show(chat)
    elif rest.lower() in NONE:
        _use(chat, None)
    elif rest.lower() == "any":
        _use(chat, Grammar.json_schema(True))
    else:
        _use(chat, Grammar.json_schema(rest if rest.startswith("{") else _content(rest)))


def _grammar(chat: Conversation, rest: str) -> None:
    kind, _, text = rest.partition(" ")
    if not rest:
        _show(chat)
    elif rest.lower() in NONE:
        _use(chat, None)
    elif kind == "regex" and text.strip():
        _use(chat, Grammar.regex(text.strip()))
    elif kind == "choice" and text.strip():
        try:
            _use(chat, Grammar.choice(shlex.split(text)))
        except ValueError as err:
            raise UsageError(f"{text!r:.60} has a quote that is not closed") from err
    else:
        _use(chat, Grammar.lark(_content(rest)))


def _think(chat: Conversation, rest: str) -> None:
    settings = chat.session.settings
    if rest:
        mode = next((known for known in THOUGHTS if known == rest.lower()), None)
        if mode is None:
            raise UsageError(f"{rest!r:.60} is no way to show thoughts", hint=f"use one of {', '.join(THOUGHTS)}")
        chat.session.settings = settings = replace(settings, thoughts=mode)
    else:
        replies = [turn for turn in chat.session.turns if turn.role == "assistant"]
        thoughts = chat.session.voice.parts(replies[-1])[0] if replies else ""
        if thoughts:
            chat.screen.verbatim(thoughts)
            return
        chat.screen.notice("no thoughts came before the last reply" if replies else "there is no reply yet")
    said = {"show": "are shown", "fold": "are folded into one line", "hide": "are not shown"}[settings.thoughts]
    chat.screen.notice(f"what the model thinks before its answer: thoughts {said}")


def _content(name: str) -> str:
    return text_of(Path(os.path.expanduser(name.strip("\"'"))))


def _use(chat: Conversation, grammar: Grammar | None) -> None:
    if grammar is not None and find_spec("llguidance") is None:
        raise UsageError("grammars need the package llguidance", hint="pip install 'exl-runtime[grammar]'")
    chat.session.settings = replace(chat.session.settings, grammar=grammar)
    _show(chat)


def _show(chat: Conversation) -> None:
    grammar = chat.session.settings.grammar
    if grammar is None:
        chat.screen.notice("replies may look like anything")
        return
    names = {"json_schema": "be JSON under", "regex": "match the pattern", "lark": "follow", "choice": "be one of"}
    chat.screen.notice(f"replies have to {names[grammar.kind]}: {status.excerpt(grammar.text, 200)} (/grammar none)")


COMMANDS = (
    Command(
        "think",
        "/think [show | fold | hide]",
        "the thoughts before the last reply; or what becomes of them on the screen",
        GROUP,
        _think,
    ),
    Command(
        "json", "/json [FILE | {SCHEMA} | any | none]", "replies are JSON, valid under a JSON schema", GROUP, _json
    ),
    Command(
        "grammar",
        "/grammar [FILE | regex PATTERN | choice A B.. | none]",
        "replies follow a grammar (a file in Lark's EBNF), a pattern, or are one of some texts",
        GROUP,
        _grammar,
    ),
)
