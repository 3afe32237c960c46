"""The slash commands: a table of names, and what each does to the conversation. Knows no keyboard."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from ..errors import ExlError, UsageError
from ..generation.request import Result
from ..generation.stream import Event
from . import status
from .blocks import code_blocks
from .converse import show_reply
from .screen import Screen
from .session import ChatSession
from .settings import ReplySettings, change, full_name, get_setting, setting_names, shown


@dataclass(slots=True)
class Conversation:
    """What commands act on. `draft` goes on the next input line; `draft_edits` is the message it will replace."""

    session: ChatSession
    screen: Screen
    can_draft: bool = False
    file: Path | None = None  # saved to or loaded from last
    left_file: bool = False  # the conversation in it was cleared away
    draft: str = ""
    draft_edits: int | None = None
    done: bool = False
    last: Result | None = None
    interrupted: bool = False  # the last reply was stopped with Ctrl-C

    def reply(self, events: Iterator[Event]) -> None:
        """Show a reply with its status line."""
        result, self.interrupted = show_reply(self.session, events, self.screen)
        self.last = result or self.last


@dataclass(frozen=True, slots=True)
class Command:
    """`run` gets the conversation and the text behind the name, without blanks around it."""

    name: str
    usage: str
    help: str
    group: str
    run: Callable[[Conversation, str], None]
    aliases: tuple[str, ...] = ()


def handle(chat: Conversation, line: str) -> bool:
    """Carry out `line` if it is a command. False: it is a message. Errors of the user are shown, not raised."""
    if not line.startswith("/") or line.startswith("//"):
        return False
    name, _, rest = line[1:].partition(" ")
    try:
        find(name).run(chat, rest.strip())
    except ExlError as err:
        chat.screen.error(str(err))
    except OSError as err:  # whatever a file system may say, no command ends the conversation
        chat.screen.error(f"/{name}: {err.strerror or err}")
    return True


def message(line: str) -> str:
    """The message in a line that is no command: a doubled slash at the start stands for one."""
    return line[1:] if line.startswith("//") else line


def find(name: str) -> Command:
    """The command called `name`. Raises UsageError offering the nearest."""
    wanted = name.strip().lower()
    for command in COMMANDS:
        if wanted == command.name or wanted in command.aliases:
            return command
    names = [alias for command in COMMANDS for alias in (command.name, *command.aliases)]
    near = get_close_matches(wanted, names, n=1, cutoff=0.5) or [known for known in names if known.startswith(wanted)]
    way_out = "a message that starts with a slash is written with two: //"
    if wanted and near:
        raise UsageError(f"there is no command /{name}", hint=f"did you mean /{near[0]}? ({way_out})")
    raise UsageError(f"there is no command /{name}", hint=f"/help lists them; {way_out}")


def _help(chat: Conversation, rest: str) -> None:
    if rest:
        command = find(rest.removeprefix("/"))
        also = f" (also /{', /'.join(command.aliases)})" if command.aliases else ""
        chat.screen.show(f"{command.usage}{also}\n  {command.help}")
        return
    for group in dict.fromkeys(command.group for command in COMMANDS):
        rows = [(command.usage, command.help) for command in COMMANDS if command.group == group]
        chat.screen.table(rows, title=group)
    chat.screen.notice(KEYS)


KEYS = (
    "Enter sends; Alt-Enter, a \\ at the end of the line or a text between triple quotes makes several lines. "
    "Ctrl-C stops a reply and keeps it; again, or Ctrl-D, quits. A message that starts with a slash: //like this."
)


def _system(chat: Conversation, rest: str) -> None:
    session = chat.session
    if not rest:
        chat.screen.verbatim("no system prompt" if session.system is None else session.system)
        return
    session.system = None if rest.lower() in ("none", "off") else rest
    chat.screen.notice("system prompt removed" if session.system is None else "system prompt set; it holds from now on")


def _set(chat: Conversation, rest: str) -> None:
    settings = chat.session.settings
    if not rest:
        default = ReplySettings()
        rows = []
        for name in setting_names():
            value, usual = shown(get_setting(settings, name)), shown(get_setting(default, name))
            rows.append((name, value, "" if value == usual else f"default {usual}"))
        chat.screen.table(rows)
        return
    name, value = _name_and_value(rest)
    if not value:
        name = full_name(name)
        chat.screen.show(f"{name} = {shown(get_setting(settings, name))}")
        return
    chat.session.settings = change(settings, name, value)
    name = full_name(name)
    chat.screen.notice(f"{name} = {shown(get_setting(chat.session.settings, name))}")


def _name_and_value(text: str) -> tuple[str, str]:
    name, _, value = text.partition(" ")
    if "=" in name:
        name, _, start = name.partition("=")
        value = f"{start} {value}"
    return name, value.strip().removeprefix("=").strip()


def _sampler(chat: Conversation, rest: str) -> None:
    chain = chat.session.settings.sampling.effective_chain()
    chat.screen.table([(str(number), step) for number, step in enumerate(chain, 1)], title="steps, in this order")


def _regen(chat: Conversation, rest: str) -> None:
    sampling = chat.session.settings.sampling
    events = chat.session.stream_regenerate()
    if sampling.greedy or sampling.seed is not None:
        why = "temperature 0 always takes the best token" if sampling.greedy else f"the seed is fixed ({sampling.seed})"
        chat.screen.notice(f"{why}: with the same settings the reply will be the same")
    chat.reply(events)


def _continue(chat: Conversation, rest: str) -> None:
    chat.reply(chat.session.stream_extend())


def _undo(chat: Conversation, rest: str) -> None:
    taken = chat.session.undo()
    chat.screen.notice(f"taken back: {status.excerpt(taken.content)}")


def _edit(chat: Conversation, rest: str) -> None:
    said = [turn for turn in chat.session.turns if turn.role == "user"]
    first, _, text = rest.partition(" ")
    try:
        index = int(first)
    except ValueError:
        index, text = -1, rest
    if text:
        chat.reply(chat.session.stream_edit(index, text.strip()))
        return
    if not said or not -len(said) <= index < len(said):
        raise UsageError(f"there is no message {index}", hint="/turns lists the messages with their numbers")
    if not chat.can_draft:
        raise UsageError("say what the message should be", hint="/edit N new text; /turns lists the numbers")
    chat.draft, chat.draft_edits = said[index].content, index
    chat.screen.notice("change the message and press Enter; everything after it will be replaced")


def _turns(chat: Conversation, rest: str) -> None:
    rows, number = [], 0
    left = len(chat.session.forgotten)
    for place, turn in enumerate(chat.session.turns):
        label = str(number) if turn.role == "user" else ""
        number += turn.role == "user"
        note = "no longer seen by the model" if place < left else ""
        rows.append((label, turn.role, note, status.excerpt(turn.content, 60)))
    if not rows:
        raise UsageError("nothing was said yet")
    chat.screen.table(rows)


def _clear(chat: Conversation, rest: str) -> None:
    chat.session.clear()
    chat.last, chat.left_file = None, chat.file is not None
    chat.screen.notice("a new conversation; system prompt and settings stay")


def _save(chat: Conversation, rest: str) -> None:
    if chat.left_file and not rest:  # it would write over the conversation that was left
        raise UsageError("which file? this is a new conversation", hint=f"the one before is in {chat.file}")
    path = _path(chat, rest)
    chat.session.save(path)
    chat.file, chat.left_file = path, False
    chat.screen.notice(f"saved {len(chat.session.turns)} messages to {path}")


def _load(chat: Conversation, rest: str) -> None:
    path = _path(chat, rest)
    chat.session = ChatSession.load(path, chat.session.runtime)
    chat.file, chat.last, chat.left_file = path, None, False
    show_loaded(chat)


def show_loaded(chat: Conversation) -> None:
    """What was loaded, and how it ended."""
    turns = len(chat.session.turns)
    chat.screen.notice(f"loaded {turns} messages, with their system prompt and settings, from {chat.file}")
    for turn in chat.session.turns[-2:]:
        chat.screen.notice(f"{turn.role}: {status.excerpt(turn.content, 100)}")


def _path(chat: Conversation, rest: str) -> Path:
    if rest:
        return Path(os.path.expanduser(rest.strip("\"'")))
    if chat.file is None:
        raise UsageError("which file?", hint="for example /save talk.json, and later /load talk.json")
    return chat.file


def _template(chat: Conversation, rest: str) -> None:
    messages = chat.session.seen_messages
    if not messages:
        raise UsageError("nothing was said yet, so there is nothing to render")
    asks = messages[-1]["role"] == "user"
    rendered = chat.session.runtime.render(messages, add_generation_prompt=asks)
    chat.screen.verbatim(rendered.text)
    chat.screen.notice(f"{len(rendered.ids)} tokens:")
    chat.screen.verbatim(" ".join(map(str, rendered.ids)))


def _tokens(chat: Conversation, rest: str) -> None:
    tokenizer = chat.session.runtime.tokenizer
    text = rest or (chat.session.turns[-1].content if chat.session.turns else "")
    if not text:
        raise UsageError("which text?", hint="/tokens TEXT, or say something first")
    ids = tokenizer.encode(text, parse_special=False)
    chat.screen.table([(str(index), repr(tokenizer.piece(index))[1:-1]) for index in ids], title=f"{len(ids)} tokens")


def _stats(chat: Conversation, rest: str) -> None:
    runtime = chat.session.runtime
    rows = [("model", status.start_line(runtime.info))]
    for entry in fields(runtime.stats):
        value = getattr(runtime.stats, entry.name)
        if entry.name.endswith("_bytes"):
            value = status.size(value)
        elif isinstance(value, float):
            value = f"{value:.1f}"
        rows.append((entry.name.replace("_", " "), str(value)))
    if chat.last is not None:
        rows.append(("last reply", status.status_line(chat.last, runtime.info.context)))
    chat.screen.table(rows)


def _copy(chat: Conversation, rest: str) -> None:
    replies = [turn.content for turn in chat.session.turns if turn.role == "assistant"]
    if not replies:
        raise UsageError("there is no reply to copy")
    text, what = replies[-1], "the reply"
    if rest:
        blocks = code_blocks(text)
        if not rest.isdecimal() or not 1 <= int(rest) <= len(blocks):
            raise UsageError(f"there is no code block {rest}", hint=f"the last reply has {len(blocks)}")
        text, what = blocks[int(rest) - 1], f"code block {rest}"
    if not chat.screen.copy(text):
        raise UsageError("this terminal has no clipboard that could be reached", hint="/save writes a file")
    chat.screen.notice(f"copied {what} ({len(text)} characters), if the terminal allows it")


def _exit(chat: Conversation, rest: str) -> None:
    chat.done = True


COMMANDS: tuple[Command, ...] = (
    Command("regen", "/regen", "make the last reply again", "turns", _regen, ("regenerate", "r")),
    Command("continue", "/continue", "let the model go on with its last reply", "turns", _continue, ("cont",)),
    Command("edit", "/edit [N] [TEXT]", "change a message (the last, or number N)", "turns", _edit, ("e",)),
    Command("undo", "/undo", "take the last message and its reply back", "turns", _undo),
    Command("turns", "/turns", "list the messages with their numbers", "turns", _turns),
    Command("clear", "/clear", "start a new conversation", "turns", _clear, ("new", "reset")),
    Command("system", "/system [TEXT | none]", "show, set or remove the system prompt", "model", _system),
    Command("set", "/set [NAME [VALUE]]", "show or change how replies are made", "model", _set),
    Command("sampler", "/sampler", "the steps that choose a token, as they are set", "model", _sampler),
    Command("template", "/template", "the exact prompt the model sees, and its token ids", "model", _template),
    Command("tokens", "/tokens [TEXT]", "the tokens of a text, or of the last message", "model", _tokens),
    Command("stats", "/stats", "speed, cache and memory", "model", _stats),
    Command("save", "/save [FILE]", "write the conversation to a file", "files", _save),
    Command("load", "/load [FILE]", "go on with a saved conversation", "files", _load),
    Command("copy", "/copy [N]", "copy the last reply, or its code block N", "files", _copy),
    Command("help", "/help [COMMAND]", "this list", "program", _help, ("h", "?")),
    Command("exit", "/exit", "leave", "program", _exit, ("quit", "q", "bye")),
)
