"""`exl chat`: a conversation in the terminal, or through pipes."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..chat.settings import DEFAULT_MAX_TOKENS, ReplySettings
from ..console.terminal import Terminal, user_text
from .options import (
    add_loading,
    add_model,
    add_output,
    add_reply,
    add_sampling,
    chosen_sampling,
    given_sampling,
    open_runtime,
    stop_texts,
)

DEMO_MAX_TOKENS = 200  # the toy has little to say, and does not always notice when it has said it
DEMO_TEMPERATURE = 0.3  # it knows few things well; drawing boldly makes it wrong
OVERFLOW = "drop"
HELP = "talk to a model in the terminal; with a pipe, every line of standard input is a message"
USAGE = "[MODEL] [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser, optional=True)
    add_loading(parser)
    add_reply(parser, overflow=OVERFLOW, max_tokens=None, shown=f"{DEFAULT_MAX_TOKENS}, demo {DEMO_MAX_TOKENS}")
    add_sampling(parser)
    group = parser.add_argument_group("the terminal")
    group.add_argument("--load", metavar="FILE", help="go on with a saved conversation")
    group.add_argument("--plain", action="store_true", help="no colours, no cursor movement, a simple input line")
    group.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does the same)")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Open the model and talk. Raises ExlError."""
    from ..chat import repl
    from ..chat.screen import make_screen
    from ..chat.session import ChatSession

    sampling = chosen_sampling(args)
    settings = ReplySettings(
        max_tokens=args.max_tokens or DEFAULT_MAX_TOKENS,
        stop=stop_texts(args),
        overflow=args.overflow,
        sampling=sampling,
    )
    terminal = Terminal.detect(plain=args.plain, no_color=args.no_color)
    screen = make_screen(terminal)
    with open_runtime(args) as runtime:
        if runtime.info.is_demo:
            if args.max_tokens is None:
                settings = replace(settings, max_tokens=DEMO_MAX_TOKENS)
            if args.sampling_temperature is None:
                settings = replace(settings, sampling=replace(sampling, temperature=DEMO_TEMPERATURE))
        if args.load is not None:
            session = ChatSession.load(args.load, runtime)
            session.settings = overlaid(session.settings, args)
        else:
            session = ChatSession(runtime, settings=settings)
        if args.system is not None:
            session.system = user_text(args.system)
        if not terminal.interactive:
            if not repl.run_piped(session, repl.stdin_lines(), screen, verbose=bool(args.verbose)):
                screen.notice("exl: there was no message on standard input")
            return 0
        from ..chat.editor import make_editor

        repl.greet(session, screen)
        file = None if args.load is None else Path(args.load)
        repl.run(session, screen, make_editor(terminal), file=file)
        if terminal.editor:
            sys.stdout.write("\n" if not terminal.styled else "")
    return 0


def overlaid(saved: ReplySettings, args: argparse.Namespace) -> ReplySettings:
    """The settings of a saved conversation, with what the command line names on top. Raises UsageError."""
    return replace(
        saved,
        sampling=replace(saved.sampling, **given_sampling(args)),
        max_tokens=args.max_tokens or saved.max_tokens,
        stop=stop_texts(args) or saved.stop,
        overflow=saved.overflow if args.overflow == OVERFLOW else args.overflow,
    )
