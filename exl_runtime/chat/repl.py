"""The chat itself: read a message or a command, act, until the user leaves. Also the same without a terminal.

Knows the session, a screen and an editor; knows nothing of loading models.
"""

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..console.terminal import user_text
from ..errors import ExlError
from ..generation.request import Result
from ..generation.stream import Dropped, Finished, Text
from . import memory, status, variables
from .commands import Conversation, handle, message, show_loaded
from .converse import Shown
from .editor import Editor
from .interrupts import quiet_keyboard
from .screen import Screen
from .session import ChatSession
from .sight import newly_unseen
from .writing import write_in_editor

if TYPE_CHECKING:
    from ..runtime import Runtime


def greet(session: ChatSession, screen: Screen) -> None:
    """The start line; for the demo also what it is, what it can answer, and how to open a real model."""
    info = session.runtime.info
    screen.show(status.start_line(info, memory.free(info.device)))
    if info.is_demo:
        screen.notice(status.DEMO_NOTICE)
        screen.table([("try", prompt) for prompt in status.DEMO_PROMPTS])
        screen.notice(status.DEMO_WAY_OUT)
    if note := variables.warning(session.runtime, session.settings.template_args):
        screen.warning(note)
    screen.notice("/help for commands · Ctrl-C or Esc stops a reply · Ctrl-D quits")


def run(
    session: ChatSession,
    screen: Screen,
    editor: Editor,
    *,
    file: Path | None = None,
    keep: bool = False,
    open_model: "Callable[[str], Runtime] | None" = None,
) -> None:
    """Talk until /exit, Ctrl-D, or Ctrl-C twice with nothing typed in between.

    file        where `session` came from
    keep        keep conversations in the user's folder as they go on
    open_model  for /model
    """
    chat = Conversation(
        session=session,
        screen=screen,
        can_draft=editor.drafts,
        file=file,
        keep=keep,
        auto_kv=session.kv.auto,
        open_model=open_model,
    )
    if file is not None or session.file is not None:
        show_loaded(chat, session.file or file)
    chat.start_keeping()
    try:
        _talk(chat, editor)
    finally:
        kept = chat.session.file is not None and chat.session.tree.nodes
        chat.leave()
    if kept:
        screen.notice("this conversation is kept: exl chat --resume goes on with it")


def _talk(chat: Conversation, editor: Editor) -> None:
    interrupted = False
    while not chat.done:
        draft, takes = chat.draft, chat.draft_takes
        chat.draft, chat.draft_takes = "", None
        try:
            line = editor.read(draft)
        except EOFError:
            return
        except KeyboardInterrupt:
            if takes is not None:
                chat.screen.notice("the message stays as it was")
                continue
            if interrupted:
                return
            interrupted = True
            chat.screen.notice("Ctrl-C again, Ctrl-D or /exit quits")
            continue
        interrupted = False
        try:
            _act(chat, line, takes or chat.say, editor)
            while chat.wants_editor is not None:
                _write(chat, editor)
        except KeyboardInterrupt:
            interrupted = True
        interrupted, chat.interrupted = interrupted or chat.interrupted, False


def _act(chat: Conversation, line: str, takes: Callable[[str], object], editor: Editor) -> None:
    if not line.strip():
        return
    keys = bytearray()
    try:
        with quiet_keyboard(lambda: chat.session.cancel()) if editor.drafts else nullcontext(keys) as keys:
            try:
                if not handle(chat, line):
                    takes(message(line))
            except ExlError as err:
                chat.screen.error(str(err))
    finally:
        if keys:
            editor.type_ahead(bytes(keys))
    if problem := chat.session.keeping_problem():
        chat.screen.warning(f"this conversation is no longer kept by itself: {problem}")


def _write(chat: Conversation, editor: Editor) -> None:
    """A message from the user's editor, which gets the keyboard for itself."""
    text, chat.wants_editor = chat.wants_editor or "", None
    try:
        text = write_in_editor(text)
    except ExlError as err:
        chat.screen.error(str(err))
        return
    if not text:
        chat.screen.notice("nothing was written, nothing is sent")
        return
    chat.screen.show(text)
    _act(chat, f"/{text}" if text.startswith("/") else text, chat.say, editor)


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
    shown = Shown(session, reply)
    forgotten, dropped = len(session.forgotten), 0
    result: Result | None = None
    try:
        for event in session.stream(text):
            if isinstance(event, Text):
                shown.take(event)
            elif isinstance(event, Dropped):
                dropped += event.tokens
            elif isinstance(event, Finished):
                result = event.result
    except ExlError:
        # Nothing is written for a message that could not be answered; a reply that broke off keeps what was said.
        shown.finish()
        reply.finish() if shown.anything else reply.discard()
        raise
    except BaseException:
        reply.finish()
        raise
    shown.finish()
    reply.finish()
    if dropped:
        screen.warning(status.dropped_notice(newly_unseen(session, forgotten, dropped), dropped))
    if result is None:
        raise RuntimeError("the reply ended without a result")
    return result


def stdin_lines(stream: TextIO | None = None) -> Iterable[str]:
    """The lines of standard input as they come, so that another program can hold a conversation through pipes."""
    stream = stream or sys.stdin
    while line := stream.readline():
        yield line
