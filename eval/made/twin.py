"""A GGUF file with random weights in the shape of a model: what a peer that reads GGUF is measured with.

Blocks are drawn as they lie on disk, nothing is quantized. Layouts: ggml-common.h of ggml (block_q4_0, block_q8_0,
block_q4_K, block_q6_K). There is no vocabulary in the file: the peer is given token ids.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exl_runtime.config.read import read_object
from exl_runtime.console.progress import Progress
from exl_runtime.errors import EvalError, UsageError
from exl_runtime.files import PARTIAL, naming
from exl_runtime.runtime.load import DEMO_FOLDER

from .linears import PIECE
from .shape import Shape

TYPES = ("Q4_0", "Q4_K", "Q8_0", "F16")
# The usual mixtures: the head is wider, and with Q4_K the value and down projections of some layers.
HEAD = {"Q4_0": "Q6_K", "Q4_K": "Q6_K", "Q8_0": "Q8_0", "F16": "F16"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Blocks = Callable[[np.random.Generator, int, float], np.ndarray]  # rng, blocks, std -> uint8 (blocks, bytes)


def write_twin(path: Path, shape: Shape, kind: str, seed: int, progress: Progress) -> None:
    """Write one GGUF file of `shape`; kind: one of TYPES (Q4_K: the mixture known as Q4_K_M).

    Raises UsageError for sizes that do not fit the blocks, EvalError without the gguf package, StorageError.
    """
    if shape.experts:
        raise UsageError("a GGUF file of a mixture of experts", hint="give a shape without experts")
    gguf = _package()
    kind = "Q4_K" if kind == "Q4_K_M" else kind
    if kind not in TYPES:
        raise UsageError(f"unknown GGUF type {kind!r}", hint=f"use one of {', '.join(TYPES)}")
    block = max(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0] for name in (kind, HEAD[kind]))
    for name in ("hidden", "inner"):
        if getattr(shape, name) % block:
            raise UsageError(f"{name} is {getattr(shape, name)}", hint=f"{kind} wants a multiple of {block}")
    planned = list(_tensors(shape, kind))
    partial = path.with_name(path.name + PARTIAL)
    writer = gguf.GGUFWriter(partial, str((read_object(DEMO_FOLDER / "config.json") or {})["model_type"]))
    _describe(writer, shape)
    for name, rows, columns, stored, _ in planned:
        dtype = gguf.GGMLQuantizationType[stored]
        if rows == 1:
            writer.add_tensor_info(name, (columns,), np.dtype(np.float32), 4 * columns, raw_dtype=dtype)
            continue
        elements, nbytes = gguf.GGML_QUANT_SIZES[dtype]
        width = columns // elements * nbytes
        writer.add_tensor_info(name, (rows, width), np.dtype(np.uint8), rows * width, raw_dtype=dtype)
    with naming(path), progress.stage(f"making {path.name}", len(planned), "tensors") as steps:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for index, (_, rows, columns, stored, std) in enumerate(planned):
                rng = np.random.default_rng(seed * 1_000_003 + index)
                writer.write_tensor_data(_drawn(rng, rows, columns, stored, std))
                steps.advance()
            writer.close()
            partial.replace(path)
        finally:
            writer.close()
            partial.unlink(missing_ok=True)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise EvalError("GGUF files need the gguf package", hint="pip install gguf") from None
    return gguf


def _describe(writer: Any, shape: Shape) -> None:
    writer.add_name("random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")


def _tensors(shape: Shape, kind: str) -> Iterator[tuple[str, int, int, str, float]]:
    """(name, rows, columns, type, standard deviation) of every tensor; one row: a norm."""
    yield "token_embd.weight", shape.vocab, shape.hidden, kind, 1.0
    for layer in range(shape.layers):
        wider = kind == "Q4_K" and _gets_more_bits(layer, shape.layers)
        yield f"blk.{layer}.attn_norm.weight", 1, shape.hidden, "F32", 0.0
        yield f"blk.{layer}.ffn_norm.weight", 1, shape.hidden, "F32", 0.0
        for path, inputs, outputs in shape.linears():
            name = NAMES[path]
            stored = "Q6_K" if wider and name in ("attn_v", "ffn_down") else kind
            joins = name in ("attn_output", "ffn_down")
            std = 1 / math.sqrt(inputs * (2 * shape.layers if joins else 1))
            yield f"blk.{layer}.{name}.weight", outputs, inputs, stored, std
    yield "output_norm.weight", 1, shape.hidden, "F32", 0.0
    yield "output.weight", shape.vocab, shape.hidden, HEAD[kind], 1 / math.sqrt(shape.hidden)


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The layers that the Q4_K_M mixture favours: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _drawn(rng: np.random.Generator, rows: int, columns: int, stored: str, std: float) -> np.ndarray:
    """The data of one tensor: float32 (columns,) of ones for a norm, else uint8 (rows, bytes of a row)."""
    if rows == 1:
        return np.ones(columns, dtype=np.float32)
    elements, draw = _BLOCKS[stored]
    count = columns // elements
    step = max(1, PIECE // columns)
    parts = [draw(rng, min(step, rows - start) * count, std) for start in range(0, rows, step)]
    return np.concatenate(parts).reshape(rows, -1)


def _q4_0(rng: np.random.Generator, blocks: int, std: float) -> np.ndarray:
    """float16 d, 32 codes of 4 bits; w = d * (code - 8). Code 0 does not occur: the mean is 0."""
    codes = rng.integers(1, 16, size=(2, blocks, 16), dtype=np.uint8)
    deviation = math.sqrt(7 * 8 / 3)
    return np.concatenate([_halves(rng, blocks, std / deviation), codes[0] | codes[1] << 4], axis=1)


def _q8_0(rng: np.random.Generator, blocks: int, std: float) -> np.ndarray:
    """float16 d, 32 signed bytes; w = d * code."""
    codes = rng.integers(-127, 128, size=(blocks, 32), dtype=np.int8)
    return np.concatenate([_halves(rng, blocks, std / math.sqrt(127 * 128 / 3)), codes.view(np.uint8)], axis=1)


def _q4_k(rng: np.random.Generator, blocks: int, std: float) -> np.ndarray:
    """float16 d, dmin, 8 scales and 8 minima of 6 bits, 256 codes of 4 bits; w = d * scale * code - dmin * min.

    The minima equal the scales and dmin = 7.5 d, so that w = d * scale * (code - 7.5).
    """
    scales = rng.integers(32, 64, size=(blocks, 8), dtype=np.uint8)
    low, high = scales[:, :4], scales[:, 4:]
    # Bytes 0-3 and 4-7: scale and minimum of 0-3, with the upper bits of 4-7; bytes 8-11: their lower bits.
    first = low | (high >> 4) << 6
    packed = np.concatenate([first, first, (high & 15) | (high & 15) << 4], axis=1)
    rms = math.sqrt(sum(s * s for s in range(32, 64)) / 32)
    unit = _halves(rng, blocks, std / (rms * math.sqrt((16 * 16 - 1) / 12)))
    least = (unit.view(np.float16).astype(np.float32) * np.float32(7.5)).astype(np.float16).view(np.uint8)
    codes = rng.integers(0, 256, size=(blocks, 128), dtype=np.uint8)
    return np.concatenate([unit, least, packed, codes], axis=1)


def _q6_k(rng: np.random.Generator, blocks: int, std: float) -> np.ndarray:
    """128 and 64 bytes of codes of 6 bits, 16 signed scales, float16 d; w = d * scale * (code - 32).

    Half of the scales are negative, which makes up for codes reaching further down than up.
    """
    codes = rng.integers(0, 256, size=(blocks, 192), dtype=np.uint8)
    scales = rng.integers(64, 128, size=(blocks, 16), dtype=np.int8)
    scales *= rng.choice(np.array([-1, 1], dtype=np.int8), size=scales.shape)
    rms = math.sqrt(sum(s * s for s in range(64, 128)) / 64)
    unit = _halves(rng, blocks, std / (rms * math.sqrt((64 * 64 - 1) / 12)))
    return np.concatenate([codes, scales.view(np.uint8), unit], axis=1)


def _f16(rng: np.random.Generator, blocks: int, std: float) -> np.ndarray:
    values = rng.standard_normal((blocks, 1), dtype=np.float32) * np.float32(std)
    return values.astype(np.float16).view(np.uint8)


def _halves(rng: np.random.Generator, blocks: int, rms: float) -> np.ndarray:
    """uint8 (blocks, 2): float16 scales between 0.5 and 1.5 of what gives `rms` as root mean square."""
    values = (rng.random((blocks, 1), dtype=np.float32) + 0.5) * np.float32(rms / math.sqrt(13 / 12))
    return values.astype(np.float16).view(np.uint8)


_BLOCKS: dict[str, tuple[int, Blocks]] = {
    "Q4_0": (32, _q4_0),
    "Q8_0": (32, _q8_0),
    "Q4_K": (256, _q4_k),
    "Q6_K": (256, _q6_k),
    "F16": (1, _f16),
}
