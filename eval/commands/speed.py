"""`python -m eval speed`: tokens per second, beside peers in the same run."""

import argparse
from typing import TYPE_CHECKING

from exl_runtime.errors import UsageError

from ..opening import add_loading, add_model, open_model, positive
from ..outcome import Outcome

if TYPE_CHECKING:
    from exl_runtime.console.progress import Progress

HELP = "tokens per second, time to the first token and memory of a model, and of peers in the same run"
USAGE = (
    "MODEL [--prompt 512] [--generate 128] [--batch 1] [--context-filled N] [--runs 5] [--threads N[,N...]] "
    "[--peer llama.cpp=FILE.gguf] [options]"
)
EPILOG = """\
Every run takes prompts nobody has seen. Peers run in turn with the model (run 1 of each, run 2 of each, ...), with the
same ids and the same number of threads, and their ratios are taken run by run.
peers: llama.cpp=FILE.gguf (llama-cpp-python), exllamav2=DIR (on a GPU), transformers=DIR (dense models)"""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_model(parser)
    group = parser.add_argument_group("what is run")
    group.add_argument("--prompt", type=positive, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    group.add_argument("--generate", type=positive, default=128, metavar="N", help="tokens timed (default: 128)")
    group.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at once (default: 1)")
    group.add_argument(
        "--context-filled", type=positive, metavar="N", help="tokens before the first timed one (default: the prompt)"
    )
    group.add_argument(
        "--turns",
        type=positive,
        metavar="N",
        help="instead: time to the first token in each of N turns of a growing conversation, each with --prompt new "
        "tokens and a reply of --generate",
    )
    group.add_argument("--runs", type=positive, default=5, metavar="N", help="default: 5")
    group.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="measure this beside it; may be repeated"
    )
    add_loading(parser, threads=thread_counts)


def thread_counts(text: str) -> tuple[int, ...]:
    """ "1,2" as an argument: numbers of threads, one table each."""
    return tuple(positive(part) for part in text.split(","))


def run(args: argparse.Namespace, progress: "Progress") -> Outcome:
    """Open, measure, tell. Raises ExlError."""
    from exl_runtime.config.read import load_config
    from exl_runtime.config.resolve import resolve
    from exl_runtime.runtime.load import find

    from ..speed.contestant import peak_resident
    from ..speed.peers import split_peer
    from ..speed.report import facts_of, text_of
    from ..speed.sprint import sprint
    from ..speed.workload import Workload

    load = Workload(
        prompt=args.prompt, generate=args.generate, batch=args.batch, filled=args.context_filled, runs=args.runs
    )
    if args.turns is not None:
        return _turns(args, progress)
    peers = [split_peer(text) for text in args.peer]
    if len({name for name, _ in peers}) != len(peers):
        raise UsageError("--peer: the same peer twice", hint="run the command once for each of its models")
    files = load_config(find(args.model))
    load.check(resolve(files.config, files.generation).context_length)
    threads = args.threads or (None,)
    args.threads = threads[0]  # what opening a model takes
    base = peak_resident()
    with open_model(args.model, args, progress, context=load.context) as runtime:
        found, setup = sprint(runtime, load, threads, peers, progress, base_bytes=base)
    return Outcome(text=text_of(found, setup), facts=facts_of(found, setup), code=130 if found.partial else 0)


def _turns(args: argparse.Namespace, progress: "Progress") -> Outcome:
    from ..speed.sprint import plain_ids
    from ..speed.turns import facts_of, talk, text_of

    if args.turns < 2 or args.batch != 1 or args.peer or args.context_filled:
        raise UsageError("--turns takes 2 or more", hint="--batch, --peer and --context-filled are for the other run")
    threads = args.threads or (None,)
    if len(threads) > 1:
        raise UsageError("--turns takes one number of threads")
    args.threads = threads[0]
    context = args.turns * (args.prompt + args.generate)
    with open_model(args.model, args, progress, context=context) as runtime:
        found = talk(
            runtime, plain_ids(runtime), turns=args.turns, new=args.prompt, reply=args.generate, runs=args.runs
        )
        told = (found, runtime.info.name, runtime.info.device)
    return Outcome(text=text_of(*told), facts=facts_of(*told))
