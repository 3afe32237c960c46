"""`exl serve`: the OpenAI HTTP API for one model, for the programs of one user."""

import argparse
import os
import sys
from typing import Any

from ..console.terminal import clean_line
from ..errors import UsageError
from ..tokenizer.template_args import unmentioned_line
from .options import (
    OVERFLOWS,
    add_loading,
    add_model,
    add_output,
    add_sampling,
    chosen_sampling,
    open_runtime,
    positive,
    template_args,
)

HELP = "serve one model to other programs over HTTP, through the OpenAI API"
USAGE = "[MODEL] [options]"
HOST, PORT = "127.0.0.1", 8000
KEY = "EXL_API_KEY"
PARALLEL, QUEUE, BODY_MB, GRACE = 16, 64, 8, 5


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser, optional=True)
    group = parser.add_argument_group(
        "the server",
        "POST /v1/chat/completions, /v1/completions, /tokenize, /detokenize; GET /v1/models, /health. "
        "For programs that use OpenAI's API: base_url http://127.0.0.1:8000/v1 and any key.",
    )
    group.add_argument("--host", default=HOST, help=f"address to listen at (default: {HOST}, this machine only)")
    group.add_argument("--port", type=port, default=PORT, metavar="N", help=f"0: any free one (default: {PORT})")
    group.add_argument("--api-key", metavar="KEY", help=f"what clients must know; better in ${KEY}, where ps is blind")
    group.add_argument("--name", help="what the model is called (default: the name of its folder)")
    group.add_argument(
        "--alias", action="append", metavar="NAME", help="another name that means it; '*': any name; repeatable"
    )
    group.add_argument(
        "--allow-origin", action="append", metavar="ORIGIN", help="a web page that may use it, '*': all; repeatable"
    )
    group.add_argument(
        "--parallel", type=positive, default=PARALLEL, metavar="N", help=f"replies at once (default: {PARALLEL})"
    )
    group.add_argument(
        "--queue", type=positive, default=QUEUE, metavar="N", help=f"more that may wait, then 429 (default: {QUEUE})"
    )
    group.add_argument(
        "--max-body", type=positive, default=BODY_MB, metavar="MB", help=f"largest request (default: {BODY_MB} MiB)"
    )
    group.add_argument(
        "-n", "--max-tokens", type=positive, metavar="N", help="of chat replies that name no limit (default: context)"
    )
    group.add_argument(
        "--overflow",
        choices=OVERFLOWS,
        default="error",
        help="a full context, unless a request says: refuse, drop the oldest turns, or slide a window (default: error)",
    )
    group.add_argument(
        "--grace",
        type=positive,
        default=GRACE,
        metavar="S",
        help=f"seconds for replies after Ctrl-C (default: {GRACE})",
    )
    group.add_argument("-q", "--quiet", action="store_true", help="no line per request")
    add_sampling(parser)
    add_loading(parser)
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Open the model and serve it until Ctrl-C or SIGTERM. Raises ExlError."""
    from ..server.run import open_socket, require_extra, serve
    from ..server.settings import LOOPBACK, Settings

    require_extra()
    sampling = chosen_sampling(args)
    values = template_args(args)
    key = api_key(args)
    local = args.host in LOOPBACK or args.host.startswith("127.")
    with open_socket(args.host, args.port) as opened:  # before the model is read: a port in use is known at once
        if not local and key is None:
            say(f"anybody who can reach {args.host} can use this model: --api-key or ${KEY} asks for a key")
        with open_runtime(args) as runtime:
            if silent := () if runtime.template is None else runtime.template.unmentioned(values):
                say(unmentioned_line(silent))
            settings = Settings(
                name=args.name or runtime.info.name,
                aliases=frozenset(args.alias or ()),
                sampling=sampling,
                max_tokens=args.max_tokens,
                template_args=values,
                overflow=args.overflow,
                api_key=key,
                origins=tuple(args.allow_origin or ()),
                hosts=LOOPBACK | {args.host} if local else None,
                parallel=args.parallel,
                queue=args.queue,
                max_body=args.max_body * 2**20,
            )
            serve(
                runtime,
                settings,
                opened,
                ready=lambda host, number: say(ready_line(settings.name, host, number, runtime.info.context)),
                log_line=(lambda line: None) if args.quiet else say,
                grace=args.grace,
            )
    say("stopped")
    return 0


def ready_line(name: str, host: str, number: int, context: int) -> str:
    """Where programs find the server."""
    shown = f"[{host}]" if ":" in host else host
    return f"{name}, context {context} tokens, at http://{shown}:{number}/v1 (Ctrl-C stops)"


def api_key(args: argparse.Namespace) -> str | None:
    """From --api-key or the environment. Raises UsageError for one that no HTTP header can carry."""
    key: str | None = args.api_key if args.api_key is not None else os.environ.get(KEY)
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError("the API key must be printable ASCII without spaces", hint="such as the output of uuidgen")
    return key


def say(line: str) -> None:
    """A line on standard error."""
    sys.stderr.write(f"exl: {clean_line(line)}\n")
    sys.stderr.flush()


def port(text: str) -> Any:
    """A number from 0 to 65535."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 65535")
    return int(text)
