"""One decode step on a CUDA device taken apart: recorded and eager, its products alone, and what a launch costs.

A step is measured on the model itself, from a token to the next one on the host, with greedy sampling on the device.
The eager one runs the same operations without recording them. Tests put their own recorder and timer in place.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import CacheType
from exl_runtime.model.fused import FusedTransformer
from exl_runtime.model.graph import DecodeGraphs, Recorder, Row
from exl_runtime.model.linear import Linear
from exl_runtime.model.mlp import Mlp
from exl_runtime.model.placement import geometry_of
from exl_runtime.ops.linear.packed_cuda import gated_together, multiply_together
from exl_runtime.sampling.device import DeviceSampling
from exl_runtime.sampling.params import SamplingParams

from ..tables import Table, left, right
from .spread import short
from .timers import Timer

GREEDY = SamplingParams(temperature=0.0)
CALLS = 20  # replays of one sample
SAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStep:
    """Seconds of one step. recorded and eager: wall time for each token; products and empty: time on the device.

    empty     a recorded step with a single small operation in it
    read      bytes a step reads; bandwidth: bytes per second, measured beside it
    """

    context: int
    steps: int
    recorded: float
    eager: float
    products: float
    empty: float
    read: float
    bandwidth: float

    @property
    def fixed(self) -> float:
        """What a step costs beside its products: attention over `context` keys is in it."""
        return self.recorded - self.products


class Unrecorded:
    """A recorder that runs the work itself every time; all else is done by the one it is made of."""

    def __init__(self, recorder: Recorder) -> None:
        self.why_not = recorder.why_not
        self.upload = recorder.upload
        self.fetch = recorder.fetch

    def record(self, warm_up: Callable[[], None], body: Callable[[], None]) -> Callable[[], None]:
        """See `graph.Recorder`."""
        warm_up()
        return body


def measure_step(
    model: FusedTransformer,
    recorder: Recorder,
    *,
    cache: CacheType,
    context: int,
    steps: int,
    clock: Callable[[], float],
    timer: Timer,
    bandwidth: float,
) -> DeviceStep:
    """`steps` tokens behind `context` ones, of one sequence. ValueError if a pass of the model cannot be recorded.

    clock  of the host, in seconds; timer: of the device
    """
    geometry = geometry_of(model.spec, cache)
    kv = KVStorage(geometry, geometry.pages_for(context + 2 * steps + 2), model.device)
    if (why := recorder.why_not() or model.why_not_recorded(kv)) is not None:
        raise ValueError(why)
    with torch.inference_mode():
        products = recorder.record(products_of(model), products_of(model))
        number = torch.zeros(1, device=model.device)
        empty = recorder.record(lambda: _ignore(number.zero_()), lambda: _ignore(number.zero_()))
        return DeviceStep(
            context=context,
            steps=steps,
            recorded=_per_token(model, recorder, kv, context, steps, clock),
            eager=_per_token(model, Unrecorded(recorder), kv, context, steps, clock),
            products=_best(products, timer),
            empty=_best(empty, timer),
            read=model.nbytes - model.embedding.nbytes + geometry.bytes_per_token * (context + steps),
            bandwidth=bandwidth,
        )


def products_of(model: FusedTransformer) -> Callable[[], None]:
    """Every matrix of a pass over one token, as the pass launches them, and nothing else."""
    spec, device = model.spec, model.device
    h = torch.randn(1, spec.hidden_size, device=device).to(model.dtype)
    attended = torch.randn(1, spec.heads * spec.head_dim, device=device).to(model.dtype)
    stream = torch.zeros(1, spec.hidden_size, device=device)
    inner: dict[int, torch.Tensor] = {}

    def add(linear: Linear, x: torch.Tensor) -> None:
        add_to = getattr(linear.kernel, "add_to", None)
        linear.kernel(x) if add_to is None else add_to(stream.zero_(), x)

    def run() -> None:
        for block in model.blocks:
            attention, mlp = block.attention, block.mlp
            assert isinstance(mlp, Mlp)
            inputs = [attention.query.kernel, attention.key.kernel, attention.value.kernel]
            if multiply_together(inputs, h) is None:
                for kernel in inputs:
                    kernel(h)
            add(attention.out, attended)
            if gated_together(mlp.gate.kernel, mlp.up.kernel, h, mlp.activation, wide=True) is None:
                mlp.gate.kernel(h)
                mlp.up.kernel(h)
            width = mlp.down.kernel.shape.in_features
            if width not in inner:
                inner[width] = torch.randn(1, width, device=device)
            add(mlp.down, inner[width])
        wide = getattr(model.head.kernel, "float32", None)
        model.head.kernel(h) if wide is None else wide(h)

    return run


def text_of(found: DeviceStep) -> str:
    """A table, and how far from the bytes."""
    table = Table([left("of one step"), right("us")])
    for name, seconds in (
        ("recorded, token to token", found.recorded),
        ("eager, token to token", found.eager),
        ("products alone, on the device", found.products),
        (f"all else, attention over {found.context} keys included", found.fixed),
        ("a recorded step of one small operation", found.empty),
    ):
        table.add(name, f"{seconds * 1e6:.1f}")
    floor = found.read / found.bandwidth
    return "\n".join(
        [
            table.text(),
            f"it reads {found.read / 1e6:.0f} MB, {short(floor * 1e3)} ms at {found.bandwidth / 1e9:.0f} GB/s: "
            f"{100 * floor / found.recorded:.0f} % of the bandwidth of copying",
        ]
    )


def facts_of(found: DeviceStep) -> dict[str, object]:
    """The same for programs, in seconds and bytes."""
    return {**asdict(found), "fixed": found.fixed}


def _per_token(
    model: FusedTransformer, recorder: Recorder, kv: KVStorage, context: int, steps: int, clock: Callable[[], float]
) -> float:
    """Seconds for each of `steps` tokens. As many run before, so that everything is recorded and warm."""
    chooser = DeviceSampling(slots=1, vocab_size=model.spec.vocab_size, capacity=context, device=model.device)
    prompt = [1] * context  # nobody reads the text: keys and values are whatever the pages hold
    slot = chooser.admit(GREEDY, seed=0, eos_ids=set(), prompt=prompt, generated=[])
    graphs = DecodeGraphs(model, kv, chooser, recorder)
    pages, token, length = [*range(kv.pages)], 1, context - 1
    started = 0.0
    for step in range(2 * steps):
        if step == steps:
            started = clock()
        row = Row(owner=0, token=token, length=length, pages=pages, rope_length=0, slot=slot)
        token, length = max(0, graphs.step([row])[0]), length + 1
    seconds = clock() - started
    graphs.drop()
    return seconds / steps


def _best(work: Callable[[], None], timer: Timer) -> float:
    def calls() -> None:
        for _ in range(CALLS):
            work()

    return min(timer(calls) for _ in range(SAMPLES)) / CALLS


def _ignore(_: object) -> None:
    return
