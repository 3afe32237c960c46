"""From memory to bits: the largest average of the decoder layers that leaves room for cache and working memory.

Counts what the runtime's own memory model counts (`model.placement`); weights are as large as on disk, which is what
kernels that read EXL2 directly keep of them.
"""

import math
from dataclasses import dataclass

import torch

from exl_runtime.config import MlpSpec, ModelSpec
from exl_runtime.console.sizes import size_text
from exl_runtime.errors import ConvertError, UsageError
from exl_runtime.model.placement import PAGE_SIZE, MemoryPlan, plan, resolve_cache

from .encoded import stored_bits
from .layouts import head_option
from .options import CACHES

CONTEXT = 8192  # tokens, unless the user says otherwise or the model ends before
LOWEST, HIGHEST = 2.0, 8.0  # no matrix is stored with less, every one can be with more than this
STEP = 1000  # bits are rounded down to a thousandth
HALF = 2  # bytes of a value that stays dense


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What was chosen and what it takes. Bytes by purpose; `memory` is what there was to share.

    bits  average of the decoder layers' matrices as stored, overhead included; `limited`: it could not use more memory
    """

    bits: float
    weight_bytes: int
    cache_bytes: int
    working_bytes: int
    memory: int
    context: int
    cache: str
    head_bits: int
    limited: bool = False

    @property
    def total_bytes(self) -> int:
        """All of it, at most `memory`."""
        return self.weight_bytes + self.cache_bytes + self.working_bytes


def planned_context(spec: ModelSpec, asked: int | None) -> int:
    """Tokens to plan for: `asked`, or `CONTEXT` if the model reaches that far. Raises ConvertError beyond its end."""
    if asked is None:
        return min(CONTEXT, spec.context_length)
    if asked > spec.context_length:
        raise ConvertError(
            f"--context {asked}: the model ends at {spec.context_length} tokens",
            hint=f"--context {spec.context_length} is the most",
        )
    return asked


def bits_for_memory(
    spec: ModelSpec,
    *,
    memory: int,
    context: int,
    cache: str,
    head_bits: int,
    embedding_rows: int,
    parameters: int,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
) -> Budget:
    """The largest bits, to a thousandth, with which weights, cache and working memory fit into `memory` bytes.

    context          tokens of the cache, in whole pages and one more, as the runtime plans
    cache            a type the runtime knows: "fp32" | "fp16" | "bf16" | "q8" | "q6" | "q4" | "k6v4" ...
    head_bits        of the output head, which always has a matrix of its own in an EXL2 folder
    embedding_rows   of the table as stored        parameters  weights in the matrices of the decoder layers
    lowest, highest  what the model can be stored with, if that is known better than the format's limits

    Raises ConvertError when not even `lowest` fits, with what would, and for unknown settings.
    """
    dense = _dense_bytes(spec, embedding_rows) + _head_bytes(spec, head_bits)
    planned = _planned(spec, context, cache)
    cache_bytes, working = planned.cache_bytes, planned.working_bytes
    room = memory - dense - cache_bytes - working
    bits = min(8 * room * STEP // parameters / STEP, highest)
    if bits < lowest:
        weights = dense + _layer_bytes(parameters, lowest)
        raise _does_not_fit(spec, memory, context, cache, lowest, weights, cache_bytes, working)
    return Budget(
        bits=bits,
        weight_bytes=dense + _layer_bytes(parameters, bits),
        cache_bytes=cache_bytes,
        working_bytes=working,
        memory=memory,
        context=context,
        cache=cache,
        head_bits=head_bits,
        limited=bits == highest,
    )


def describe(budget: Budget) -> str:
    """What was chosen and why, in one line."""

    def size(nbytes: int) -> str:
        return size_text(nbytes, like=budget.memory)

    most = ", the most this model can be stored with" if budget.limited else ""
    return (
        f"{budget.bits:.3f} bits per weight{most}: {size(budget.weight_bytes)} of weights (the head at "
        f"{budget.head_bits} bits), {size(budget.cache_bytes)} for {budget.context} tokens of {budget.cache} cache, "
        f"{size(budget.working_bytes)} to work in; {size(budget.total_bytes)} of {size(budget.memory)}"
    )


def _layer_bytes(parameters: int, bits: float) -> int:
    return math.ceil(round(parameters * bits / 8, 3))  # thousandths of a bit are no binary fractions


def _head_bytes(spec: ModelSpec, head_bits: int) -> int:
    layout = head_option(head_bits).layout(spec.hidden_size)
    return stored_bits(layout, spec.hidden_size, spec.vocab_size) // 8


def _dense_bytes(spec: ModelSpec, embedding_rows: int) -> int:
    """Everything that is not quantized: embedding, norms, routers, biases."""
    hidden, wide, narrow = spec.hidden_size, spec.heads * spec.head_dim, 2 * spec.kv_heads * spec.head_dim
    values = embedding_rows * hidden + hidden
    per_layer = (4 if spec.post_norms else 2) * hidden + (2 * spec.head_dim if spec.qk_norm else 0)
    per_layer += (wide + narrow if spec.qkv_bias else 0) + (hidden if spec.out_bias else 0)
    for layer in spec.layers:
        values += per_layer
        if not isinstance(layer.mlp, MlpSpec):
            values += layer.mlp.experts * hidden
        elif layer.mlp.bias:
            values += 2 * layer.mlp.intermediate_size + hidden
    return values * HALF


def _planned(spec: ModelSpec, context: int, cache: str) -> MemoryPlan:
    """What the runtime plans beside the weights. Raises ConvertError for an unknown type of cache."""
    try:
        kind = resolve_cache(cache, torch.device("cpu"))
    except UsageError as err:
        raise ConvertError(f"--cache {cache}: not a type of cache", hint=err.hint) from err
    return plan(spec, context=context, weight_bytes=0, cache=kind)


def _does_not_fit(
    spec: ModelSpec, memory: int, context: int, cache: str, lowest: float, weights: int, cache_bytes: int, working: int
) -> ConvertError:
    def size(nbytes: int) -> str:
        return size_text(nbytes, like=memory)

    total = weights + cache_bytes + working
    ways = []
    if (shorter := _longest(spec, memory - weights, cache, context // PAGE_SIZE)) > 0:
        ways.append(f"--context {shorter * PAGE_SIZE}")
    bytes_with = {name: weights + _planned(spec, context, name).total_bytes for name in CACHES}
    # CACHES is sorted by falling size: the first that fits costs the least quality.
    if (smaller := next((name for name, taken in bytes_with.items() if taken <= memory), None)) is not None:
        ways.append(f"--cache {smaller}")
    ways.append(f"--target-vram {_enough(total, binary=memory % 2**20 == 0)}")
    return ConvertError(
        f"--target-vram {size(memory)} does not hold this model: even at {lowest:.3f} bits the weights take "
        f"{size(weights)}, the {cache} cache of {context} tokens {size(cache_bytes)}, the work {size(working)}: "
        f"together {size(total)}",
        hint=f"{' or '.join(ways)} would do",
    )


def _enough(nbytes: int, *, binary: bool) -> str:
    """A size for --target-vram, rounded up to hundredths of its unit."""
    base, letter = (1024, "i") if binary else (1000, "")
    power, name = (3, "G") if nbytes >= base**3 else (2, "M")
    return f"{math.ceil(nbytes * 100 / base**power) / 100:.2f}{name}{letter}B"


def _longest(spec: ModelSpec, room: int, cache: str, below: int) -> int:
    """The most pages, `below` at the most, whose cache and working memory fit into `room` bytes; 0: none."""
    low, high = 0, below
    while low < high:
        pages = (low + high + 1) // 2
        if _planned(spec, pages * PAGE_SIZE, cache).total_bytes <= room:
            low = pages
        else:
            high = pages - 1
    return low
