"""The chat itself: read a message or a command, act, until the user leaves. Also the same without a terminal.

Knows the session, a screen and an editor; knows nothing of loading models.
"""

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

from ..console.terminal import user_text
from ..errors import ExlError
from ..generation.request import Result
from ..generation.stream import Dropped, Finished, Text
from . import status
from .commands import Conversation, handle, message, show_loaded
from .editor import Editor
from .interrupts import quiet_keyboard
from .screen import Screen
from .session import ChatSession


def greet(session: ChatSession, screen: Screen) -> None:
    """The start line; for the demo also what it is, what it can answer, and how to open a real model."""
    info = session.runtime.info
    screen.show(status.start_line(info))
    if info.is_demo:
        screen.notice(status.DEMO_NOTICE)
        screen.table([("try", prompt) for prompt in status.DEMO_PROMPTS])
        screen.notice(status.DEMO_WAY_OUT)
    screen.notice("/help for commands · Ctrl-C stops a reply · Ctrl-D quits")


def run(session: ChatSession, screen: Screen, editor: Editor, *, file: Path | None = None) -> None:
    """Talk until /exit, Ctrl-D, or Ctrl-C twice with nothing typed in between. `file`: where `session` came from."""
    chat = Conversation(session=session, screen=screen, can_draft=editor.drafts, file=file)
    if file is not None:
        show_loaded(chat)
    interrupted = False
    while not chat.done:
        draft, edits = chat.draft, chat.draft_edits
        chat.draft, chat.draft_edits = "", None
        try:
            line = editor.read(draft)
        except EOFError:
            return
        except KeyboardInterrupt:
            if edits is not None:
                screen.notice("the message stays as it was")
                continue
            if interrupted:
                return
            interrupted = True
            screen.notice("Ctrl-C again, Ctrl-D or /exit quits")
            continue
        interrupted = False
        try:
            with quiet_keyboard() if editor.drafts else nullcontext():
                _act(chat, line, edits)
        except KeyboardInterrupt:
            interrupted = True
        interrupted, chat.interrupted = interrupted or chat.interrupted, False


def _act(chat: Conversation, line: str, edits: int | None) -> None:
    if line.strip() and not handle(chat, line):
        text = message(line)
        chat.reply(chat.session.stream(text) if edits is None else chat.session.stream_edit(edits, text))


def run_piped(session: ChatSession, lines: Iterable[str], screen: Screen, *, verbose: bool) -> int:
    """Every line that is not empty is a message of one conversation; replies go to the screen one after another.

    Returns how many there were. Raises ExlError at the first message that cannot be answered.
    """
    answered = 0
    if session.runtime.info.is_demo:
        screen.notice(f"exl: {status.DEMO_LINE}")
    for line in lines:
        text = user_text(line).strip()
        if not text:
            continue
        result = _pipe_reply(session, text, screen)
        answered += 1
        if verbose:
            screen.notice(status.status_line(result, session.runtime.info.context))
    return answered


def _pipe_reply(session: ChatSession, text: str, screen: Screen) -> Result:
    reply = screen.reply()
    forgotten, dropped, said = len(session.forgotten), 0, False
    result: Result | None = None
    try:
        for event in session.stream(text):
            if isinstance(event, Text):
                reply.text(event.text)
                said = True
            elif isinstance(event, Dropped):
                dropped += event.tokens
            elif isinstance(event, Finished):
                result = event.result
    except ExlError:
        # Nothing is written for a message that could not be answered; a reply that broke off keeps what was said.
        reply.finish() if said else reply.discard()
        raise
    except BaseException:
        reply.finish()
        raise
    reply.finish()
    if dropped:
        screen.warning(status.dropped_notice(session.forgotten[forgotten:], dropped))
    if result is None:
        raise RuntimeError("the reply ended without a result")
    return result


def stdin_lines(stream: TextIO | None = None) -> Iterable[str]:
    """The lines of standard input as they come, so that another program can hold a conversation through pipes."""
    stream = stream or sys.stdin
    while line := stream.readline():
        yield line
