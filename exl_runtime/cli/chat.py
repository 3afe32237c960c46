"""`exl chat`: a conversation in the terminal, or through pipes."""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat.settings import DEFAULT_MAX_TOKENS, THOUGHTS, ReplySettings
from ..console.terminal import Terminal, clean_line, user_text
from ..errors import UsageError
from ..sampling.params import SamplingParams
from .options import (
    GUIDANCE,
    add_constraints,
    add_loading,
    add_model,
    add_output,
    add_reply,
    add_sampling,
    chosen_sampling,
    chosen_shape,
    given_sampling,
    open_runtime,
    stop_texts,
    template_args,
)

if TYPE_CHECKING:
    from ..chat.session import ChatSession
    from ..runtime import Runtime

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
    add_sampling(parser, temperature=f"default: {SamplingParams().temperature:g}, demo {DEMO_TEMPERATURE:g}")
    add_constraints(parser, chat=True)
    group = parser.add_argument_group("the terminal")
    group.add_argument("--load", metavar="FILE", help="go on with a saved conversation, or number N of --list")
    group.add_argument("--resume", action="store_true", help="go on with the conversation that was kept last")
    group.add_argument("--list", action="store_true", help="list the conversations that were kept, and leave")
    group.add_argument("--no-keep", action="store_true", help="do not keep this conversation in your state folder")
    group.add_argument(
        "--save-kv",
        action="store_true",
        help="keep what was computed too (large), so that going on with this conversation later starts at once",
    )
    group.add_argument(
        "--thoughts",
        choices=THOUGHTS,
        help="what the model thinks before it answers: shown, folded into one line, or hidden (default: fold)",
    )
    group.add_argument("--plain", action="store_true", help="no colours, no cursor movement, a simple input line")
    group.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does the same)")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Open the model and talk. Raises ExlError."""
    from ..chat import memory, repl, variables
    from ..chat.recall import recall_kept
    from ..chat.screen import make_screen

    if args.resume and args.load is not None:
        raise UsageError("--resume and --load are two ways to go on", hint="give one of them")
    terminal = Terminal.detect(plain=args.plain, no_color=args.no_color)
    if args.list:
        return _list()
    settings = ReplySettings(
        max_tokens=args.max_tokens or DEFAULT_MAX_TOKENS,
        stop=stop_texts(args),
        stop_ids=tuple(args.stop_id or ()),
        stop_loop=args.stop_loop,
        overflow=args.overflow,
        sampling=chosen_sampling(args),
        template_args=template_args(args),
        **shaped(args),
    )
    kept = _kept(args)  # before a model is opened in vain
    screen = make_screen(terminal)
    with ExitStack() as opened:
        runtime = opened.enter_context(open_runtime(args))
        session = _session(args, runtime, settings, kept)
        session.kv.auto = args.save_kv
        opened.callback(lambda: session.close())
        if args.system is not None:
            session.system = user_text(args.system)
        if not terminal.interactive:
            if note := variables.warning(runtime, session.settings.template_args):
                screen.warning(note)
            if not repl.run_piped(session, repl.stdin_lines(), screen, verbose=bool(args.verbose)):
                screen.notice("exl: there was no message on standard input")
            return 0
        from ..chat.editor import make_editor

        def open_model(name: str) -> "Runtime":
            same = name in (args.model, runtime.info.path)
            own = {} if same else {"template": None, "lora": None}  # what belongs to the model of the command line
            return opened.enter_context(
                open_runtime(argparse.Namespace(**vars(args) | own | {"model": name, "draft": None}))
            )

        recall_kept(runtime, session.file)
        repl.greet(session, screen)
        repl.run(
            session,
            screen,
            make_editor(terminal, lambda: memory.models_beside(session.runtime.info.path)),
            file=None if args.load is None or kept is not None else Path(args.load),
            keep=not args.no_keep,
            open_model=open_model,
        )
        if terminal.editor:
            sys.stdout.write("\n" if not terminal.styled else "")
    return 0


def _kept(args: argparse.Namespace) -> Path | None:
    """The kept conversation that the arguments name, if they name one. Raises UsageError."""
    from ..chat import store

    if args.resume:
        known = store.paths()
        if not known:
            raise UsageError("no conversation was kept yet", hint=f"they are kept in {store.chats_dir()}")
        return known[0]
    if args.load is None or Path(args.load).exists():
        return None
    return store.find(args.load)


def _session(args: argparse.Namespace, runtime: "Runtime", settings: ReplySettings, kept: Path | None) -> "ChatSession":
    from ..chat.session import ChatSession

    if kept is not None or args.load is not None:
        session = ChatSession.load(args.load, runtime) if kept is None else ChatSession.resume(kept, runtime)
        session.settings = overlaid(session.settings, args)
        return session
    if runtime.info.is_demo:
        if args.max_tokens is None:
            settings = replace(settings, max_tokens=DEMO_MAX_TOKENS)
        if args.sampling_temperature is None:
            settings = replace(settings, sampling=replace(settings.sampling, temperature=DEMO_TEMPERATURE))
    return ChatSession(runtime, settings=settings)


def _list() -> int:
    from ..chat import store
    from ..chat.commands.files import rows_of

    for chat in store.stored():
        number, title, about = rows_of(chat)
        print(f"{number:>4}  {clean_line(title)}  ({about})")
    return 0


def overlaid(saved: ReplySettings, args: argparse.Namespace) -> ReplySettings:
    """The settings of a saved conversation, with what the command line names on top. Raises UsageError."""
    return replace(
        saved,
        sampling=replace(saved.sampling, **given_sampling(args)),
        max_tokens=args.max_tokens or saved.max_tokens,
        stop=stop_texts(args) or saved.stop,
        stop_ids=tuple(args.stop_id or saved.stop_ids),
        stop_loop=args.stop_loop or saved.stop_loop,
        template_args={**saved.template_args, **template_args(args)},
        overflow=saved.overflow if args.overflow == OVERFLOW else args.overflow,
        **shaped(args),
    )


def shaped(args: argparse.Namespace) -> dict[str, Any]:
    """The settings about what replies look like that the command line names. Raises UsageError."""
    negative = None if args.negative_prompt is None else user_text(args.negative_prompt)
    guidance = GUIDANCE if args.guidance is None and negative else args.guidance
    given = {**chosen_shape(args), "guidance": guidance, "negative": negative, "thoughts": args.thoughts}
    return {name: value for name, value in given.items() if value is not None and value != ()}
