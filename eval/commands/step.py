"""`python -m eval step`: where one decode step spends its time."""

import argparse
from typing import TYPE_CHECKING

from exl_runtime.errors import UsageError

from ..opening import add_loading, add_model, open_model, positive
from ..outcome import Outcome
from .speed import thread_counts

if TYPE_CHECKING:
    import torch

    from exl_runtime.console.progress import Progress

HELP = "where one decode step spends its time: products, attention, and everything around them"
USAGE = "MODEL [--prompt 512] [--generate 64] [--threads N[,N...]] [options]"
EPILOG = """\
CPU: medians over the steps of one sequence, greedy, without guesses; each part counts what it spends itself.
GPU: the recorded step and the eager one, its products alone, and an empty recorded step."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_model(parser)
    group = parser.add_argument_group("what is run")
    group.add_argument("--prompt", type=positive, default=512, metavar="N", help="tokens before it (default: 512)")
    group.add_argument("--generate", type=positive, default=64, metavar="N", help="steps (default: 64)")
    group.add_argument(
        "--no-ahead", action="store_true", help="CPU: no pass is begun before Python is through with the one before"
    )
    add_loading(parser, threads=thread_counts)


def run(args: argparse.Namespace, progress: "Progress") -> Outcome:
    """Open, measure, tell. Raises ExlError."""
    import torch

    from exl_runtime.model.placement import resolve_device
    from exl_runtime.ops import native

    from ..speed.bandwidth import Bandwidth
    from ..speed.breakdown import break_down, facts_of, text_of
    from ..speed.sprint import plain_ids
    from ..speed.traffic import traffic_of
    from ..speed.workload import Workload, prompts_of

    device = resolve_device(args.device)
    if device.type == "cuda" and args.backend in ("auto", "cuda"):
        return _on_device(args, device, progress)
    counts = args.threads or (None,)
    args.threads = counts[0]
    load = Workload(prompt=args.prompt, generate=args.generate + 2, batch=1)
    found = []
    with open_model(args.model, args, progress, context=load.context) as runtime:
        if runtime.info.backend != "cpu":
            raise UsageError(
                "a step is taken apart on the backends cpu and cuda only", hint="give --device cpu --backend cpu"
            )
        prompt = list(prompts_of(load, 0, plain_ids(runtime)).cold[0])
        memory = Bandwidth(torch.device("cpu"))
        for count in counts:
            progress.say(f"measuring with {count or 'all'} threads")
            native.set_threads(count)
            traffic, bandwidth = traffic_of(runtime, 1), memory.measure()
            try:
                ahead = not args.no_ahead
                one = break_down(runtime, prompt, args.generate, traffic=traffic, bandwidth=bandwidth, ahead=ahead)
                found.append(one)
            except ValueError as err:
                raise UsageError(f"{args.model} runs operator by operator: {err}") from err
        name = runtime.info.name
    heading = f"{name}: one step of one sequence, {args.prompt} tokens in the cache"
    text = "\n\n".join([heading, *(text_of(one) for one in found)])
    return Outcome(text=text, facts={"model": name, "prompt": args.prompt, "tables": [facts_of(one) for one in found]})


def _on_device(args: argparse.Namespace, device: "torch.device", progress: "Progress") -> Outcome:
    import time

    from exl_runtime.checkpoint.reader import Checkpoint
    from exl_runtime.config.read import load_config
    from exl_runtime.config.resolve import resolve
    from exl_runtime.model.fused import FusedTransformer
    from exl_runtime.model.graph_cuda import CudaRecorder
    from exl_runtime.model.loader import load_transformer
    from exl_runtime.model.placement import resolve_cache
    from exl_runtime.ops import native
    from exl_runtime.runtime.load import find

    from ..speed.bandwidth import Bandwidth
    from ..speed.device_step import facts_of, measure_step, text_of
    from ..speed.timers import cuda_timer

    native.resolve_backend("cuda", device)  # refuses with the reason
    folder = find(args.model)
    files = load_config(folder)
    spec = resolve(files.config, files.generation)
    progress.say(f"opening {args.model}")
    with Checkpoint.open(folder) as checkpoint:
        model = load_transformer(checkpoint, spec, quantization=files.quantization, device=device, backend="cuda")
    assert isinstance(model, FusedTransformer)
    bandwidth = Bandwidth(device).measure()
    progress.say("measuring")
    try:
        found = measure_step(
            model,
            CudaRecorder(device),
            cache=resolve_cache(args.cache, device),
            context=args.prompt,
            steps=args.generate,
            clock=time.perf_counter,
            timer=cuda_timer(device),
            bandwidth=bandwidth,
        )
    except ValueError as err:
        raise UsageError(f"a step of {args.model} cannot be recorded: {err}") from err
    heading = f"{folder.name}: one step of one sequence, {args.prompt} tokens in the cache"
    facts = {"model": folder.name, "prompt": args.prompt, "device_step": facts_of(found)}
    return Outcome(text=f"{heading}\n\n{text_of(found)}", facts=facts)
