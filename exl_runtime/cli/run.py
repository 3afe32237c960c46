"""`exl run`: one prompt, one reply, for scripts."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..chat.status import DEMO_LINE, status_line
from ..console.terminal import clean, user_text
from ..errors import ExlError, UsageError
from .options import (
    GUIDANCE,
    add_constraints,
    add_loading,
    add_model,
    add_output,
    add_reply,
    add_sampling,
    chosen_constraints,
    chosen_sampling,
    open_runtime,
    stop_texts,
    template_args,
)

if TYPE_CHECKING:
    from ..chat.thinking import Part, Voice
    from ..generation.request import Result
    from ..generation.stream import Event

MAX_TOKENS = 256
HELP = "answer one prompt and end; for scripts"
USAGE = "MODEL -p TEXT [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    group = parser.add_argument_group("the prompt")
    group.add_argument("-p", "--prompt", metavar="TEXT", required=True, help="the prompt; - reads standard input")
    group.add_argument("--raw", action="store_true", help="complete the text as it is, without a chat template")
    group.add_argument("--ids", action="store_true", help="the prompt is a list of token ids (implies --raw)")
    add_reply(parser, overflow="error", max_tokens=MAX_TOKENS, shown=str(MAX_TOKENS))
    parser.add_argument(
        "--thoughts",
        choices=("show", "hide"),
        default="show",
        help="what the model thinks before it answers: printed between its marks, or left out (default: show)",
    )
    parser.add_argument("--deadline", type=seconds, metavar="SECONDS", help="end the reply after so long")
    add_sampling(parser)
    add_constraints(parser)
    add_loading(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON event per line; the last has the whole result")
    group.add_argument("--logprobs", type=count, default=0, metavar="N", help="with --json: log-probabilities, N best")
    group.add_argument("--prompt-logprobs", type=count, default=0, metavar="N", help="the same for the prompt's tokens")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Open the model, answer, report. Raises ExlError."""
    sampling = chosen_sampling(args)  # wrong values are known before a model is loaded
    constraints = chosen_constraints(args)
    if args.system is not None and (args.raw or args.ids):
        raise UsageError("--system needs a chat template", hint="leave out --raw and --ids, or put it into the prompt")
    values = template_args(args)
    if values and (args.raw or args.ids):
        raise UsageError("--template-arg needs a chat template", hint="leave out --raw and --ids")
    prompt = read_prompt(args)
    constraints |= negative_prompt(args)
    constraints |= {"prompt_logprobs": args.prompt_logprobs} if args.prompt_logprobs else {}
    try:
        with open_runtime(args) as runtime:
            from ..chat.thinking import Voice

            answers = not (args.raw or args.ids) and constraints["grammar"] is None
            voice = Voice.of(runtime, values) if answers else Voice()
            stream = runtime.stream(
                prompt,
                max_tokens=args.max_tokens,
                sampling=sampling,
                stop=stop_texts(args),
                overflow=args.overflow,
                deadline=args.deadline,
                logprobs=args.logprobs,
                template_args=values,
                **constraints,
                **voice.options,
            )
            if runtime.info.is_demo and not args.json:
                sys.stderr.write(f"exl: {DEMO_LINE}\n")
                sys.stderr.flush()
            with stream as events:
                emit = JsonOutput(voice) if args.json else TextOutput(voice if args.thoughts == "hide" else Voice())
                result = _follow(voice.heard(events), emit)
            if args.verbose:
                sys.stderr.write(status_line(result, runtime.info.context) + "\n")
    except ExlError as err:
        if args.json:
            _write_json({"event": "error", "error": type(err).__name__, "message": str(err)})
        raise
    return 0


def read_prompt(args: argparse.Namespace) -> Any:
    """Text, token ids, or messages, as the options say. Raises UsageError."""
    text = user_text(sys.stdin.read() if args.prompt == "-" else args.prompt)
    if args.prompt == "-" and not (args.raw or args.ids):
        text = text.rstrip("\r\n")  # the line end of `echo` is not part of the question
    return _prompt_of(text, args)


def negative_prompt(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Runtime.stream` for --negative-prompt and --guidance: it is made as the prompt is."""
    if args.negative_prompt is None and args.guidance is None:
        return {}
    if args.negative_prompt is None:
        raise UsageError("--guidance needs --negative-prompt", hint="say what the reply is to be led away from")
    guidance = GUIDANCE if args.guidance is None else args.guidance
    if not guidance > 1:  # 1 would be an expensive nothing, less leads towards it
        raise UsageError(f"--guidance is {guidance:g}", hint="give a number above 1, say 1.5")
    return {"negative_prompt": _prompt_of(user_text(args.negative_prompt), args), "guidance": guidance}


def _prompt_of(text: str, args: argparse.Namespace) -> Any:
    if args.ids:
        try:
            ids = [int(word) for word in text.replace(",", " ").split()]
        except ValueError as err:
            raise UsageError(
                "with --ids the prompt is a list of whole numbers", hint="for example -p '1 15 207'"
            ) from err
        if not ids:
            raise UsageError("the prompt is empty", hint="give at least one token id")
        return ids
    if args.raw:
        return text
    if not text.strip():
        raise UsageError("the prompt is empty", hint="give some text with -p, or -p - and text on standard input")
    messages = [{"role": "user", "content": text}]
    return [{"role": "system", "content": user_text(args.system)}, *messages] if args.system is not None else messages


def _follow(events: Any, emit: "Callable[[Event], None]") -> "Result":
    result = None
    for event in events:
        emit(event)
        result = getattr(event, "result", result)
    if result is None:
        raise RuntimeError("the stream of events ended without a result")
    return result


class TextOutput:
    """The text as it comes, without the thoughts that `voice` knows. On a terminal control characters are left out; a
    pipe gets them as they are."""

    def __init__(self, voice: "Voice") -> None:
        self._reading = voice.reading()
        self._filtered = sys.stdout.isatty()
        self._last = ""

    def __call__(self, event: "Event") -> None:
        """Write what the event says; warn on standard error when something left the context."""
        from ..generation.stream import Dropped, Finished, Text

        if isinstance(event, Text):
            self._write(self._reading.take(event))
        elif isinstance(event, Dropped):
            sys.stderr.write(f"exl: the context is full: {event.tokens} tokens of the prompt were left out\n")
        elif isinstance(event, Finished):
            self._write(self._reading.finish())
            if self._last != "\n":
                sys.stdout.write("\n")
                sys.stdout.flush()

    def _write(self, parts: "Iterable[Part]") -> None:
        text = "".join(part for kind, part in parts if kind == "content")
        text = clean(text) if self._filtered else text
        sys.stdout.write(text)
        sys.stdout.flush()
        self._last = text[-1:] or self._last


class JsonOutput:
    """One line per event: {"event": "started" | "prefilled" | "text" | "dropped" | "done", ...its fields}.

    The last one tells thoughts and answer apart where there are thoughts; `text` is both, with the marks.
    """

    def __init__(self, voice: "Voice") -> None:
        self._voice = voice

    def __call__(self, event: "Event") -> None:
        """Write the line."""
        entry = asdict(event)
        if "result" in entry:
            reading = self._voice.reading()
            parts = [*reading.push(entry["result"]["text"]), *reading.finish()]
            answer = "".join(text for kind, text in parts if kind == "content")
            apart = {"thoughts": reading.thoughts, "answer": answer} if reading.thoughts else {}
            _write_json({"event": "done", **entry["result"], **apart})
            return
        entry.pop("request_id")
        if entry.get("logprobs", "") is None:
            del entry["logprobs"]
        _write_json({"event": type(event).__name__.lower(), **entry})


def _write_json(entry: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(_finite(entry)) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    """JSON has no infinities: the log-probability of an impossible token becomes null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        number = float(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from err
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def count(text: str) -> int:
    """A whole number from 0 up."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)
