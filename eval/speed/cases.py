"""Single operations at the shapes of a real model, each beside what torch does for the same result.

Every operation has several copies of what it reads, together larger than the last-level cache, and calls go round
them: what a token of a large model meets is memory, not cache.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from exl_runtime.cache.geometry import PAGE_SIZE
from exl_runtime.cache.types import CacheType
from exl_runtime.errors import UsageError
from exl_runtime.formats.base import LinearShape, QuantFormat
from exl_runtime.formats.dense import Dense
from exl_runtime.formats.detect import GptqHints
from exl_runtime.formats.exl2 import WIDTHS, Exl2
from exl_runtime.formats.gptq import Gptq
from exl_runtime.ops.kv_quant import dequantize, quantize
from exl_runtime.ops.linear.base import LinearKernel
from exl_runtime.ops.linear.packed_cuda import PackedCuda
from exl_runtime.ops.linear.select import select
from exl_runtime.ops.table import opset

from ..made import linears
from ..made.shape import Shape

FORMATS = ("exl2", "gptq", "dense")
HEAD_BITS = 6
DEQUANT = "dequantized"  # beside torch's dtypes: our own other way, with the same dtype
MOST_COPIES = 1024  # of something small; then caches are colder than with one, not cold
CACHES = 8  # as the bandwidth beside it is measured; at twice the cache products seem a tenth faster than they are
Call = Callable[[int], object]  # the work, on copy i


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation, ready to run.

    m       rows of x, or tokens
    nbytes  that one call has to move through memory; flop: multiplications and additions of one call
    others  the same result by torch, by name: (call, copies of its own)
    """

    kind: str  # "linear" | "attention" | "small"
    name: str
    stored: str
    m: int
    call: Call
    copies: int
    nbytes: float
    flop: float
    others: dict[str, tuple[Call, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where operations run. cache_bytes: of the last-level cache."""

    device: torch.device
    backend: str
    cache_bytes: int

    def copies(self, nbytes: float) -> int:
        """Copies that together are CACHES times the last-level cache, at least two."""
        return min(MOST_COPIES, max(2, math.ceil(CACHES * self.cache_bytes / max(1.0, nbytes))))

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """What torch multiplies in, for comparison; the first is also that of x."""
        wide = torch.float32 if self.backend != "cuda" and self.device.type == "cpu" else torch.float16
        return wide, torch.bfloat16


@dataclass(frozen=True, slots=True)
class Stored:
    """How a matrix is stored. bits: a width (exl2, gptq), an average of several (exl2), 16 (dense)."""

    format: str
    bits: float

    def __str__(self) -> str:
        return "bf16" if self.format == "dense" else f"{self.format} {self.bits:g}"


def stored_as(formats: Sequence[str], bits: Sequence[float]) -> list[Stored]:
    """Every format with every width it has. Raises UsageError for an unknown format, or widths that nobody has."""
    found = []
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"unknown format {name!r}", hint=f"give some of {', '.join(FORMATS)}")
        if name == "dense":
            found.append(Stored(name, 16))
        for width in bits if name != "dense" else ():
            if name == "exl2" and not min(WIDTHS) <= width <= max(WIDTHS):
                raise UsageError(f"--bits {width:g}", hint=f"give numbers from {min(WIDTHS)} to {max(WIDTHS)}")
            if name == "exl2" or width in (2, 3, 4, 8):
                found.append(Stored(name, width))
    if not found:
        raise UsageError("GPTQ has none of these widths", hint="give 2, 3, 4 or 8")
    return found


def matrices(shape: Shape) -> list[tuple[str, int, int]]:
    """(names, in_features, out_features) of every distinct matrix of a layer, and of the head."""
    names: dict[tuple[int, int], list[str]] = {}
    for path, inputs, outputs in shape.linears():
        names.setdefault((inputs, outputs), []).append(path.split(".")[-1].removesuffix("_proj"))
    found = [(",".join(group), inputs, outputs) for (inputs, outputs), group in names.items()]
    return [*found, ("head", shape.hidden, shape.vocab)]


def linear_cases(
    name: str, inputs: int, outputs: int, stored: Stored, rows: Sequence[int], where: Where
) -> Iterator[Case]:
    """One matrix with every number of rows of x; its copies are made when the first is asked for."""
    weight = _random(inputs, outputs, stored, name == "head")
    first = select(weight, where.device, where.backend)
    kernels = [first]
    kernels += [select(weight, where.device, where.backend) for _ in range(where.copies(first.storage_bytes) - 1)]
    dense = weight.dequantize().t().to(where.device)
    others: dict[torch.dtype, list[Tensor]] = {}
    for dtype in where.dtypes:
        count = where.copies(dense.numel() * dtype.itemsize)
        others[dtype] = [dense.to(dtype, copy=True).contiguous() for _ in range(count)]
    del dense
    for m in rows:
        drawn = torch.randn(m, inputs, device=where.device)
        x = {dtype: drawn.to(dtype) for dtype in where.dtypes}
        own = x[where.dtypes[0]]
        yield Case(
            kind="linear",
            name=f"{name} {inputs}x{outputs}",
            stored=str(Stored("exl2", HEAD_BITS) if name == "head" and stored.format == "exl2" else stored),
            m=m,
            call=lambda i, own=own: kernels[i](own),
            copies=len(kernels),
            nbytes=first.storage_bytes + own.element_size() * m * (inputs + outputs),
            flop=2.0 * m * inputs * outputs,
            others={
                **{
                    _short(dtype): (lambda i, a=x[dtype], w=held: F.linear(a, w[i]), len(held))
                    for dtype, held in others.items()
                },
                **_by_library(kernels, own),
            },
        )


def _by_library(kernels: Sequence[LinearKernel], x: Tensor) -> dict[str, tuple[Call, int]]:
    """What a packed CUDA matrix does with many rows, with as few as there are: dequantize, then torch's product."""
    packed = [kernel for kernel in kernels if isinstance(kernel, PackedCuda)]
    return {DEQUANT: (lambda i: packed[i].by_library(x, x.dtype), len(packed))} if packed else {}


def attention_case(shape: Shape, context: int, cache: CacheType, where: Where) -> Case:
    """One new token that attends to `context` keys, itself included, over a paged cache of type `cache`."""
    heads, narrow, dim = shape.heads, shape.kv_heads, shape.head_dim
    nbytes = context * narrow * sum(cache.row_lengths(dim)) * cache.dtype.itemsize
    copies, each = where.copies(nbytes), -(-context // PAGE_SIZE)
    widths = (cache.key_bits, cache.value_bits)
    pages = [_pages(copies * each, narrow, dim, cache, bits, where) for bits in widths]
    stored, plain = zip(*pages, strict=True)
    tables = torch.arange(copies * each, dtype=torch.int32, device=where.device).view(copies, 1, each)
    q = torch.randn(1, heads, dim, device=where.device).to(where.dtypes[0])
    starts = torch.tensor([0, 1], dtype=torch.int32, device=where.device)
    length = torch.tensor([context], dtype=torch.int32, device=where.device)
    attend, scale = opset(where.backend).paged_attention, dim**-0.5

    def ours(i: int) -> object:
        return attend(q, *stored, starts, length, tables[i], scale, None, None)

    # The queries that share a key head side by side: several times as fast in torch as enable_gqa (one query each).
    keys, values = (
        held.reshape(copies, each * PAGE_SIZE, narrow, dim)[:, :context].transpose(1, 2).contiguous() for held in plain
    )
    grouped = q.view(1, narrow, heads // narrow, dim).to(keys.dtype)

    def torch_one(i: int) -> object:
        return F.scaled_dot_product_attention(grouped, keys[i : i + 1], values[i : i + 1], scale=scale)

    return Case(
        kind="attention",
        name=f"attention over {context}",
        stored=cache.name,
        m=1,
        call=ours,
        copies=copies,
        nbytes=nbytes,
        flop=4.0 * context * heads * dim,
        others={_short(keys.dtype): (torch_one, copies)},
    )


def _pages(count: int, narrow: int, dim: int, cache: CacheType, bits: int, where: Where) -> tuple[Tensor, Tensor]:
    """Random keys or values: pages as stored, and what they stand for. Quantized pages are copies of a single one."""
    size = (PAGE_SIZE, narrow, dim)
    if not cache.quantized:
        held = torch.randn(count, *size, device=where.device).to(cache.dtype)
        return held, held
    page = quantize(torch.randn(size, device=where.device), bits)
    values = dequantize(page, dim, bits).to(where.dtypes[0])
    return page.expand(count, -1, -1, -1).contiguous(), values.expand(count, -1, -1, -1)


def small_cases(shape: Shape, rows: Sequence[int], where: Where) -> Iterator[Case]:
    """Norm, gated activation, rotation and the append to the cache, beside the reference implementations in torch."""
    ours, plain = opset(where.backend), opset("reference")
    dtype = where.dtypes[0]
    heads, narrow, dim = shape.heads, shape.kv_heads, shape.head_dim
    weight = torch.ones(shape.hidden, device=where.device)

    def tensors(*size: int) -> list[Tensor]:
        count = where.copies(math.prod(size) * dtype.itemsize)
        return [torch.randn(*size, device=where.device).to(dtype) for _ in range(count)]

    for m in rows:
        hidden, inner, q, k = tensors(m, shape.hidden), tensors(m, 2 * shape.inner), tensors(m, heads, dim), []
        k = [torch.randn(m, narrow, dim, device=where.device).to(dtype) for _ in q]
        angles = torch.randn(m, dim // 2, device=where.device)
        cos, sin = angles.cos(), angles.sin()
        pages = torch.zeros(2, -(-m // PAGE_SIZE), PAGE_SIZE, narrow, dim, device=where.device, dtype=dtype)
        slots = torch.arange(m, device=where.device)
        size = m * dtype.itemsize

        def split(i: int, held: list[Tensor] = inner) -> tuple[Tensor, Tensor]:
            return held[i][:, : shape.inner], held[i][:, shape.inner :]

        runs: dict[str, tuple[Callable[..., object], Callable[..., object], Callable[[int], tuple], int, float]] = {
            "rms_norm": (
                ours.rms_norm,
                plain.rms_norm,
                lambda i, h=hidden: (h[i], weight, 1e-5, 0.0),
                len(hidden),
                2.0 * size * shape.hidden,
            ),
            "silu * up": (
                ours.gated,
                plain.gated,
                lambda i, s=split: (*s(i), "silu"),
                len(inner),
                3.0 * size * shape.inner,
            ),
            "rope": (
                ours.rope,
                plain.rope,
                lambda i, q=q, k=k, c=cos, s=sin: (q[i], k[i], c, s),
                len(q),
                2.0 * size * (heads + narrow) * dim,
            ),
            "append_kv": (
                ours.append_kv,
                plain.append_kv,
                lambda i, k=k, p=pages, s=slots: (k[i], k[i], p[0], p[1], s),
                len(k),
                4.0 * size * narrow * dim,
            ),
        }
        for name, (fast, slow, arguments, copies, nbytes) in runs.items():
            yield Case(
                kind="small",
                name=name,
                stored=_short(dtype),
                m=m,
                call=lambda i, f=fast, a=arguments: f(*a(i)),
                copies=copies,
                nbytes=nbytes,
                flop=0.0,
                others={"fp32": (lambda i, f=slow, a=arguments: f(*a(i)), copies)},
            )


def _random(inputs: int, outputs: int, stored: Stored, head: bool) -> QuantFormat:
    shape, std = LinearShape(inputs, outputs), inputs**-0.5
    if stored.format == "exl2":
        bits = HEAD_BITS if head else stored.bits
        if bits in WIDTHS:  # nothing but this width
            group = linears.GROUP
            plan = [(int(bits), min(group, inputs - start)) for start in range(0, inputs, group)]
        else:
            plan = linears.exl2_plan(inputs, outputs, bits, linears.GROUP)
        return Exl2.load(linears.exl2(plan, outputs, std, 1, 2), shape)
    if stored.format == "gptq" and not head:
        width = int(stored.bits)
        tensors = linears.gptq(inputs, outputs, std, 1, bits=width, group=linears.GROUP, act_order=False, perm_seed=2)
        return Gptq.load(tensors, shape, hints=GptqHints(group_size=linears.GROUP, sym=True))
    pieces = torch.cat(list(linears.dense_pieces(outputs, inputs, std, 1, torch.bfloat16)))
    return Dense.load({"weight": pieces}, shape)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
