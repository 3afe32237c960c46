"""Commands about what the model reads: system prompt, template, tokens, files; and the editor to write in."""

import os
from pathlib import Path

from ...console.terminal import clean_line
from ...errors import UsageError
from .. import status, variables
from .base import Command, Conversation

GROUP = "prompt"
LARGEST = 4 << 20  # bytes of a file that is attached; no context holds more


def _system(chat: Conversation, rest: str) -> None:
    session = chat.session
    if not rest:
        chat.screen.verbatim("no system prompt" if session.system is None else session.system)
        return
    session.system = None if rest.lower() in ("none", "off") else rest
    chat.screen.notice("system prompt removed" if session.system is None else "system prompt set; it holds from now on")


def _template(chat: Conversation, rest: str) -> None:
    messages = chat.session.seen_messages
    if not messages:
        raise UsageError("nothing was said yet, so there is nothing to render")
    asks = messages[-1]["role"] == "user"
    args = chat.session.template_args
    rendered = chat.session.runtime.render(messages, add_generation_prompt=asks, template_args=args)
    chat.screen.verbatim(rendered.text)
    chat.screen.notice(f"{len(rendered.ids)} tokens:")
    chat.screen.verbatim(" ".join(map(str, rendered.ids)))
    if rows := variables.rows(chat.session.runtime, chat.session.settings):
        chat.screen.table(rows, title="variables of the template (/set changes them)")


def _tokens(chat: Conversation, rest: str) -> None:
    tokenizer = chat.session.runtime.tokenizer
    text = rest or (chat.session.said(chat.session.turns[-1]) if chat.session.turns else "")
    if not text:
        raise UsageError("which text?", hint="/tokens TEXT, or say something first")
    ids = tokenizer.encode(text, parse_special=False)
    chat.screen.table([(str(index), repr(tokenizer.piece(index))[1:-1]) for index in ids], title=f"{len(ids)} tokens")


def _file(chat: Conversation, rest: str) -> None:
    if rest.lower() in ("none", "off"):
        chat.attached.clear()
        chat.screen.notice("nothing is attached any more")
        return
    if rest:
        path = Path(os.path.expanduser(rest.strip("\"'")))
        content = text_of(path)
        chat.attached.append((path.name, content))
        count = len(chat.session.runtime.tokenizer.encode(content, parse_special=False))
        context = chat.session.runtime.info.context
        chat.screen.notice(f"{clean_line(path.name, 80)} ({status.count(count)} tokens) goes with your next message")
        if count > context * status.FULL:
            chat.screen.warning(f"that is most of the context or more: it holds {status.count(context)} tokens")
        return
    if not chat.attached:
        raise UsageError("which file?", hint="for example /file notes.txt; /file none takes it back")
    chat.screen.table([(name, f"{len(content)} characters") for name, content in chat.attached])


def text_of(path: Path) -> str:
    """The text in a file of moderate size. Raises UsageError for anything else."""
    name = clean_line(str(path))
    if not path.is_file():
        raise UsageError(f"{name} is not a file")
    if path.stat().st_size > LARGEST:
        raise UsageError(f"{name} has {status.size(path.stat().st_size)}", hint=f"at most {status.size(LARGEST)}")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise UsageError(f"{name} is not text: byte {err.start} is not UTF-8") from err
    if "\0" in content:
        raise UsageError(f"{name} is not text: it has null bytes")
    if not content.strip():
        raise UsageError(f"{name} is empty")
    return content.replace("\r\n", "\n")


def _editor(chat: Conversation, rest: str) -> None:
    chat.wants_editor = rest


COMMANDS = (
    Command("system", "/system [TEXT | none]", "show, set or remove the system prompt", GROUP, _system),
    Command("file", "/file [PATH | none]", "attach a text file to your next message", GROUP, _file),
    Command(
        "editor",
        "/editor [TEXT]",
        "write the next message in $VISUAL or $EDITOR (Ctrl-X Ctrl-E: this line)",
        GROUP,
        _editor,
    ),
    Command("template", "/template", "the exact prompt the model sees, and its token ids", GROUP, _template),
    Command("tokens", "/tokens [TEXT]", "the tokens of a text, or of the last message", GROUP, _tokens),
)
