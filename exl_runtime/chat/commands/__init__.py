"""The slash commands: the table of all of them, and how a line finds its command. Knows no keyboard."""

from difflib import get_close_matches

from ...errors import ExlError, UsageError
from . import adapters, branches, choosing, files, kv, machine, prompt, shape, turns
from .base import Command, Conversation
from .files import show_loaded

__all__ = ["COMMANDS", "Command", "Conversation", "find", "handle", "message", "show_loaded"]

KEYS = (
    "Enter sends; Alt-Enter, a \\ at the end of the line or a text between triple quotes makes several lines. "
    "Esc or Ctrl-C stops a reply and keeps it; Ctrl-C again, or Ctrl-D, quits. "
    "A message that starts with a slash: //like this."
)


# Known from other programs, and resembling nothing here that would help.
NOT_HERE = dict.fromkeys(("image", "audio", "video"), "the models that this program runs read text only")


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
    if wanted in NOT_HERE:
        raise UsageError(f"there is no command /{name}: {NOT_HERE[wanted]}")
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


def _exit(chat: Conversation, rest: str) -> None:
    chat.done = True


COMMANDS: tuple[Command, ...] = (
    *turns.COMMANDS,
    *branches.COMMANDS,
    *prompt.COMMANDS,
    *choosing.COMMANDS,
    *shape.COMMANDS,
    *adapters.COMMANDS,
    *files.COMMANDS,
    *kv.COMMANDS,
    *machine.COMMANDS,
    Command("help", "/help [COMMAND]", "this list", "program", _help, ("h", "?")),
    Command("exit", "/exit", "leave", "program", _exit, ("quit", "q", "bye")),
)
