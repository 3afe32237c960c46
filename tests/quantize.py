"""Round-to-nearest EXL2 and GPTQ folders made from dense ones, with the weights they stand for computed beside.

An independent second reading of the formats: packing is done bit by bit with numpy, values with numpy's halves.
Not a quantizer anybody should use.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, N) -> int32 (rows * bits / 32, N), one little-endian bit stream per column."""
    rows, columns = codes.shape
    single = (codes.T[:, :, None] >> np.arange(bits)) & 1  # column, row, bit: the order of the stream
    stream = np.packbits(single.astype(np.uint8).reshape(columns, rows * bits), axis=1, bitorder="little")
    return np.ascontiguousarray(stream.view("<i4").T)


def exl2(
    weight: np.ndarray, plan: list[tuple[int, int]], seed: int, permute: bool = True, rounded: bool = True
) -> tuple[Tensors, np.ndarray]:
    """weight (K, N) -> tensors by suffix, and the (K, N) float16 weights. plan: (bits, rows) of every group.

    rounded  False: float32 weights, without the last rounding of the format, that of code times scale to half
    """
    inputs, outputs = weight.shape
    padded = -(-outputs // 32) * 32
    rng = np.random.default_rng(seed)
    order = rng.permutation(inputs) if permute else np.arange(inputs)  # stored row k is model row order[k]
    stored = np.zeros((inputs, padded), dtype=np.float32)
    stored[:, :outputs] = weight[order]
    parts, scales, maxima, groups, values = [], [], [], [], []
    row = word = 0
    for bits, rows in plan:
        block = stored[row : row + rows]
        half = 2 ** (bits - 1)
        base = np.abs(block).max(axis=0) / half + 1e-9
        top = np.float16(base.max() * 1.0)
        unit = np.float16(np.float32(top) * np.float32(1 / 256))
        codes4 = np.clip(np.rint(16 * np.sqrt(base / base.max())), 1, 16).astype(np.int64)
        scale = (codes4 * codes4).astype(np.float16) * unit
        safe = np.where(scale == 0, np.float16(1), scale).astype(np.float32)
        codes = np.clip(np.rint(block / safe) + half, 0, 2 * half - 1).astype(np.int64)
        values.append(product(codes - half, scale, rounded))
        parts.append(words_of(codes, bits))
        scales.append(nibbles(codes4 - 1))
        maxima.append(top)
        groups += [bits, word]
        row += rows
        word += rows * bits // 32
    assert row == inputs
    inverse = np.empty(inputs, dtype=np.int32)
    inverse[order] = np.arange(inputs)
    tensors = {
        "q_weight": torch.from_numpy(np.concatenate(parts)),
        "q_scale": torch.from_numpy(np.stack(scales)),
        "q_scale_max": torch.from_numpy(np.array(maxima, dtype=np.float16)),
        "q_groups": torch.from_numpy(np.array(groups, dtype=np.int16)),
    }
    if permute:
        tensors["q_invperm"] = torch.from_numpy(inverse)
    dense = np.concatenate(values)[inverse][:, :outputs]
    return tensors, dense


def product(differences: np.ndarray, scales: np.ndarray, rounded: bool) -> np.ndarray:
    """Float16, or float32 where the product is exact."""
    dtype = np.float16 if rounded else np.float32
    return differences.astype(dtype) * scales.astype(dtype)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """(N,) 4-bit codes -> (N / 8,) int32, first code lowest."""
    shifts = np.arange(8, dtype=np.uint64) * 4
    return (codes.reshape(-1, 8).astype(np.uint64) << shifts).sum(axis=1).astype(np.uint32).view(np.int32)


def gptq(
    weight: np.ndarray,
    bits: int,
    group_size: int,
    seed: int,
    *,
    act_order: bool,
    symmetric: bool,
    version: int,
    rounded: bool = True,
) -> tuple[Tensors, np.ndarray]:
    """weight (K, N) -> tensors by suffix, and the (K, N) float16 weights. N must be a multiple of 32.

    rounded  see `exl2`
    """
    inputs, outputs = weight.shape
    size = inputs if group_size == -1 else group_size
    count = -(-inputs // size)
    rng = np.random.default_rng(seed)
    group = np.empty(inputs, dtype=np.int64)
    group[rng.permutation(inputs) if act_order else np.arange(inputs)] = np.arange(inputs) // size
    top = 2**bits - 1
    scales = np.zeros((count, outputs), dtype=np.float16)
    zeros = np.zeros((count, outputs), dtype=np.int64)
    for g in range(count):
        block = weight[group == g]
        if symmetric:
            scales[g] = 2 * np.abs(block).max(axis=0) / top + 1e-6
            zeros[g] = 2 ** (bits - 1)
        else:
            low, high = np.minimum(block.min(axis=0), 0), np.maximum(block.max(axis=0), 0)
            scales[g] = (high - low) / top + 1e-6
            zeros[g] = np.clip(np.rint(-low / scales[g].astype(np.float32)), 1, top)  # v1 cannot say zero
    codes = np.clip(np.rint(weight / scales[group].astype(np.float32)) + zeros[group], 0, top).astype(np.int64)
    values = product(codes - zeros[group], scales[group], rounded)
    tensors = {
        "qweight": torch.from_numpy(words_of(codes, bits)),
        "qzeros": torch.from_numpy(words_of((zeros - (version == 1)).T, bits).T.copy()),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return tensors, values


def quantize_folder(source: Path, target: Path, kind: str, *, rounded: bool = True, **options: Any) -> Tensors:
    """Write `target` as the EXL2 or GPTQ form of the dense folder `source`; return all its weights, dequantized.

    rounded  see `exl2`; what is written does not depend on it

    The result is a state dict for the source's transformers model: "the same model on the dequantized weights".
    """
    shutil.copytree(source, target)
    state: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        state.update(load_file(path))
        (target / path.name).unlink()
    config = json.loads((target / "config.json").read_text())
    if kind == "exl2":
        state = split_fused(state, config)
    stored: Tensors = {}
    dense: Tensors = {}
    for number, (name, tensor) in enumerate(sorted(state.items())):
        if not wanted(name, tensor, kind):
            stored[name] = dense[name] = tensor.half()
            continue
        weight = tensor.float().numpy().T
        tensors, values = (
            exl2(weight, plan_for(weight.shape[0], number), number, permute=number % 5 != 0, rounded=rounded)
            if kind == "exl2"
            else gptq(weight, seed=number, rounded=rounded, **options)
        )
        stem = name.removesuffix(".weight")
        stored.update({f"{stem}.{suffix}": value for suffix, value in tensors.items()})
        dense[name] = torch.from_numpy(values.T.copy())
    if kind == "gptq":
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": options["bits"],
            "group_size": options["group_size"],
            "desc_act": options["act_order"],
            "sym": options["symmetric"],
            "checkpoint_format": "gptq" if options["version"] == 1 else "gptq_v2",
            "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        }
    (target / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, target / "output.safetensors")
    return dense


def wanted(name: str, tensor: torch.Tensor, kind: str) -> bool:
    """Whether this kind of folder quantizes the tensor."""
    if tensor.dim() != 2 or "embed_tokens" in name or name.endswith(("mlp.gate.weight", "moe.gate.weight")):
        return False
    return "lm_head" not in name or kind == "exl2"


def plan_for(inputs: int, number: int) -> list[tuple[int, int]]:
    """Group plans of falling width that cover `inputs` rows, different from matrix to matrix."""
    widths = ((8, 6, 5, 4, 3, 2), (4, 4, 3), (6, 5, 5), (5, 4, 3, 3), (8, 8, 6, 6))[number % 5]
    plan: list[tuple[int, int]] = []
    left = inputs
    for bits in widths[:-1]:
        if left > 32:
            plan.append((bits, 32))
            left -= 32
    return [*plan, (min(widths[-1], plan[-1][0] if plan else 8), left)]


def split_fused(state: Tensors, config: dict[str, Any]) -> Tensors:
    """What EXL2 writers do to fused projections."""
    heads, narrow = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    out: Tensors = {}
    for name, tensor in state.items():
        if "qkv_proj" in name:
            parts = tensor.split([heads * dim, narrow * dim, narrow * dim])
            out.update(
                {name.replace("qkv_proj", p): t for p, t in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)}
            )
        elif "gate_up_proj" in name:
            parts = tensor.chunk(2)
            out.update(
                {name.replace("gate_up_proj", p): t for p, t in zip(("gate_proj", "up_proj"), parts, strict=True)}
            )
        else:
            out[name] = tensor
    return out


def join_fused(state: Tensors, like: Tensors) -> Tensors:
    """The inverse of `split_fused`, for loading into a model that fuses."""
    out = {name: tensor for name, tensor in state.items() if name in like}
    for name in like:
        if "qkv_proj" in name and name not in out:
            out[name] = torch.cat([state[name.replace("qkv_proj", p)] for p in ("q_proj", "k_proj", "v_proj")])
        elif "gate_up_proj" in name and name not in out:
            out[name] = torch.cat([state[name.replace("gate_up_proj", p)] for p in ("gate_proj", "up_proj")])
    return out
