"""`python -m convert.ablation MODEL --text FILE -b 3.0`: what each step of `best` gains over exllamav2's algorithm.

For small models, as all of it is held in memory. The figures of LOG.md come from here.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from exl_runtime.console.progress import choose_reporter
from exl_runtime.errors import ExlError

from . import allocate, classic
from .calibration import default_size, make
from .encoded import Layout, stored_bits
from .encoder import BEST, CLASSIC, Recipe
from .encoding import head_moments
from .forward import Model, embed
from .layerpass import LayerPass, Plan, encode_matrix
from .layouts import head_option
from .measure import LayerProbe, Sensitivity, top_gradient
from .measuring import measuring_rows
from .resources import chunk_rows
from .source import Source
from .states import States
from .streaming import fill

HEAD_BITS = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; exit codes as of `python -m convert`."""
    parser = argparse.ArgumentParser(prog="python -m convert.ablation", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="held-out text; its first 30 windows of 512 tokens")
    parser.add_argument("-b", "--bits", type=float, nargs="+", default=[3.0])
    parser.add_argument("--rows", type=int, help="calibration rows")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[])
    args = parser.parse_args(argv)
    try:
        with Source.open(args.source) as source:
            _run(source, args)
    except ExlError as err:
        sys.stderr.write(f"convert.ablation: {err}\n")
        return 2
    return 0


def _run(source: Source, args: argparse.Namespace) -> None:
    from exl_runtime.tokenizer.tokenizer import Tokenizer

    from .rows import token_stream

    rows, length = default_size(source.spec)
    data = make(
        source,
        files=args.calibration,
        rows=args.rows or rows,
        length=length,
        seed=0,
        memory=None,
        progress=choose_reporter(quiet=True),
    )
    ids = token_stream([args.text], Tokenizer.open(source.folder), 30 * length)
    model = Model.load(source, length)
    lab = _Lab(source, model, data.rows, ids[: ids.numel() // length * length].view(-1, length))
    measured = lab.measure()
    halves = lab.measure_classic()
    search = replace(BEST, sweeps=0)
    print(f"{'bits':>5} {'KL':>9} {'gain':>7} {'seconds':>8}  step")
    for bits in args.bits:
        old = classic.choose(halves, bits)
        new = allocate.allocate(measured, lab.bits(old)).layouts
        first = None
        for name, layouts, recipe, correct in (
            ("exllamav2's algorithm", old, CLASSIC, False),
            ("+ widths by measured divergence", new, CLASSIC, False),
            ("+ scales searched by error feedback", new, search, False),
            ("+ refinement sweeps", new, BEST, False),
            ("+ correction of earlier errors", new, BEST, True),
        ):
            started = time.perf_counter()
            found = lab.divergence(lab.encode(layouts, recipe, correct=correct))
            first = first or found
            gain = 100 * (1 - found / first)
            print(
                f"{lab.bits(layouts):5.3f} {found:9.5f} {gain:6.1f}% {time.perf_counter() - started:8.1f}  {name}",
                flush=True,
            )


class _Lab:
    """A small model, its calibration rows, and a text to judge by."""

    def __init__(self, source: Source, model: Model, rows: Tensor, text: Tensor) -> None:
        self.source, self.model, self.rows, self.text = source, model, rows, text
        self.chunk = chunk_rows(source.spec, rows.shape[1])
        self.slots = [{slot.key: slot for slot in source.slots(layer.index)} for layer in source.spec.layers]
        with torch.no_grad():
            self.truth = [torch.log_softmax(model(part), dim=-1) for part in text.split(4)]

    def bits(self, layouts: Mapping[str, Layout]) -> float:
        """Stored bits per weight of the layers."""
        every = [slot for slots in self.slots for slot in slots.values()]
        total = sum(stored_bits(layouts[s.path], s.inputs, s.outputs, biased=s.biased) for s in every)
        return total / self.source.parameters

    def measure(self) -> list[Sensitivity]:
        """All matrices, in the model's order."""
        rows = measuring_rows(self.rows)
        inputs = self._forward(rows)
        generator = torch.Generator().manual_seed(0)
        gradient = top_gradient(self.source.spec, inputs[-1], self.model.final_norm, self.model.head, generator)
        found: list[Sensitivity] = []
        for i in reversed(range(len(self.slots))):
            probe = LayerProbe(self.model.layers[i], self.slots[i], self.model.weights[i], rows.shape[0])
            gradient = probe.back(inputs[i], gradient)
            found = [*probe.sensitivities(lambda path: None), *found]
        return found

    def measure_classic(self) -> list[classic.Rows]:
        """All half layers with exllamav2's options."""
        x = embed(self.source.spec, self.model.embedding, measuring_rows(self.rows))
        found: list[classic.Rows] = []
        nothing: Callable[[str], None] = lambda note: None  # noqa: E731
        for forward, slots, w in zip(self.model.layers, self.slots, self.model.weights, strict=True):
            first, second, x = classic.measure_layer(forward, slots, w, x, chunk=self.chunk, advance=nothing)
            found += [first, second]
        return found

    @torch.no_grad()
    def encode(self, layouts: Mapping[str, Layout], recipe: Recipe, *, correct: bool) -> Model:
        """The model that comes out."""
        spec, model = self.source.spec, self.model
        count, length = self.rows.shape
        source, result = States((count, length, spec.hidden_size)), States((count, length, spec.hidden_size))
        table = model.embedding.half().float()
        fill(source, spec, model.embedding, self.rows, self.chunk)
        fill(result, spec, table, self.rows, self.chunk)
        weights = []
        for forward, slots, w in zip(model.layers, self.slots, model.weights, strict=True):
            plan = Plan(
                layouts={key: layouts[slot.path] for key, slot in slots.items()},
                recipe=recipe,
                correct=correct,
                chunk=self.chunk,
            )
            done = LayerPass(
                forward=forward,
                slots=slots,
                weights=w,
                plan=plan,
                source=source,
                quantized=result,
                keep=lambda width: States((count, length, width)),
            )
            done.run()
            weights.append(done.result)
        norm = model.final_norm.half().float()
        moments = head_moments(spec, result, norm, self.chunk, source if correct else None, model.final_norm)
        layout = head_option(HEAD_BITS).layout(spec.hidden_size)
        head = encode_matrix(model.head, moments, layout, recipe, correct=correct).encoded.weight()
        return Model(spec, model.layers, weights, embedding=table, final_norm=norm, head=head)

    @torch.no_grad()
    def divergence(self, result: Model) -> float:
        """Mean KL(source || result) on the text, nats per token."""
        total = 0.0
        for part, p in zip(self.text.split(4), self.truth, strict=True):
            q = torch.log_softmax(result(part), dim=-1)
            total += float((p.exp() * (p - q)).sum())
        return total / self.text.numel()

    @torch.no_grad()
    def _forward(self, rows: Tensor) -> list[Tensor]:
        states = [embed(self.source.spec, self.model.embedding, rows)]
        for forward, w in zip(self.model.layers, self.model.weights, strict=True):
            states.append(forward(states[-1], w))
        return states


if __name__ == "__main__":
    sys.exit(main())
