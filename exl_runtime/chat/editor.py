"""The input line: several lines, history, search, completion. Knows the names of commands and settings, no models.

`PromptEditor` needs a terminal that can move its cursor (prompt_toolkit); `LineEditor` works anywhere.
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeAlias

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.output.color_depth import ColorDepth

from ..console.terminal import Terminal, state_dir, user_text
from .commands import COMMANDS
from .export import FORMATS
from .presets import BUILT_IN
from .settings import THOUGHTS, setting_names

QUOTES = '"""'
PROMPT, MORE = "> ", "… "
Models: TypeAlias = Callable[[], Iterable[str]]


class Editor(Protocol):
    """Reads one message. Raises KeyboardInterrupt for Ctrl-C on an empty line, EOFError for Ctrl-D."""

    drafts: bool

    def read(self, draft: str = "") -> str: ...
    def type_ahead(self, keys: bytes) -> None: ...


def unfinished(text: str) -> bool:
    """Whether Enter should make a new line: a trailing backslash, or triple quotes that are still open."""
    if text.lstrip().startswith(QUOTES):
        return text.count(QUOTES) < 2
    return text.endswith("\\")


def assembled(text: str) -> str:
    """The message in what was typed: without the marks that only said that more would come."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        inside = stripped.removeprefix(QUOTES)
        inside, _, after = inside.partition(QUOTES)
        return (inside + after).strip("\n")
    return text.replace("\\\n", "\n").strip()


class CommandCompleter(Completer):
    """Names of commands behind a slash, then what the command takes: settings, commands, files, models."""

    def __init__(self, models: Models = tuple) -> None:
        self._models = models
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Only for a first line that starts with one slash."""
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        name, blank, rest = text[1:].partition(" ")
        if not blank:
            for command in COMMANDS:
                if command.name.startswith(name.lower()):
                    yield Completion(command.name, start_position=-len(name), display_meta=command.help)
        elif name == "set" and " " not in rest:
            for setting in setting_names():
                if setting.startswith(rest.lower()):
                    yield Completion(setting, start_position=-len(rest))
        elif name == "help":
            for command in COMMANDS:
                if command.name.startswith(rest.lower()):
                    yield Completion(command.name, start_position=-len(rest), display_meta=command.help)
        elif name == "preset" and " " not in rest:
            for preset in BUILT_IN:
                if preset.startswith(rest.lower()):
                    yield Completion(preset, start_position=-len(rest))
        elif name == "think" and " " not in rest:
            for mode in THOUGHTS:
                if mode.startswith(rest.lower()):
                    yield Completion(mode, start_position=-len(rest))
        elif name == "export" and " " not in rest:
            for kind in FORMATS:
                if kind.startswith(rest.lower()):
                    yield Completion(kind, start_position=-len(rest))
        elif name in ("save", "load", "file", "model", "export", "lora", "json", "grammar"):
            rest = rest.partition(" ")[2] if name == "export" else rest
            if name == "model":
                for known in self._models():
                    if known.lower().startswith(rest.lower()):
                        yield Completion(known, start_position=-len(rest))
            inner = Document(rest, len(rest))
            yield from self._paths.get_completions(inner, complete_event)


class PromptEditor:
    """Bracketed paste, Ctrl-R, Ctrl-X Ctrl-E and the arrow keys come from prompt_toolkit."""

    drafts = True

    def __init__(self, *, coloured: bool = True, models: Models = tuple) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=open_history(),
            completer=CommandCompleter(models),
            auto_suggest=AutoSuggestFromHistory(),
            complete_while_typing=True,
            multiline=True,
            key_bindings=_bindings(),
            enable_open_in_editor=True,
            prompt_continuation=lambda width, number, wrapped: MORE.rjust(width),
            color_depth=None if coloured else ColorDepth.DEPTH_1_BIT,
            reserve_space_for_menu=5,
        )

    def read(self, draft: str = "") -> str:
        """One message, assembled. Ctrl-C on a line with text empties it."""
        while True:
            try:
                return assembled(user_text(self._session.prompt(PROMPT, default=draft)))
            except KeyboardInterrupt:
                if draft or not self._session.default_buffer.text:
                    raise  # with a draft it is the edit that is given up, not only its text

    def type_ahead(self, keys: bytes) -> None:
        """What was typed before the prompt was there."""
        pressed: list[KeyPress] = []
        parser = Vt100Parser(pressed.append)
        parser.feed(keys.decode("utf-8", "ignore"))
        parser.flush()
        store_typeahead(self._session.app.input, pressed)


def _bindings() -> KeyBindings:
    keys = KeyBindings()
    writing = has_focus(DEFAULT_BUFFER)  # not while searching with Ctrl-R, where Enter takes what was found

    @keys.add("enter", filter=writing)
    def _(event: KeyPressEvent) -> None:
        buffer: Buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None  # Enter takes the completion that is selected
        elif unfinished(buffer.text):
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=writing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return keys


def open_history() -> History:
    """Past messages in a private file of the user; in memory where none can be written."""
    path = state_dir() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return PrivateHistory(path)


class PrivateHistory(FileHistory):
    """A history whose file may vanish or become unwritable without an end to the chat."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))

    def load_history_strings(self) -> Iterable[str]:
        """Newest first; an unreadable file is an empty history."""
        try:
            yield from super().load_history_strings()
        except OSError:
            return

    def store_string(self, string: str) -> None:
        """Append one entry."""
        try:
            super().store_string(string)
        except OSError:
            return


class LineEditor:
    """A prompt on standard error and lines from standard input, for terminals that can do no more."""

    drafts = False

    def read(self, draft: str = "") -> str:
        """One message; more lines are asked for while it is unfinished."""
        text = self._line(PROMPT)
        while unfinished(text):
            text += "\n" + self._line(MORE)
        return assembled(user_text(text))

    @staticmethod
    def _line(prompt: str) -> str:
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def type_ahead(self, keys: bytes) -> None:
        """Nothing: without a line editor the terminal itself keeps what was typed."""


def make_editor(terminal: Terminal, models: Models = tuple) -> Editor:
    """The best editor the terminal can run. models: names that /model could open, asked for when they are completed."""
    return PromptEditor(coloured=terminal.styled, models=models) if terminal.editor else LineEditor()
