"""Is this folder EXL2 as exllamav2's own reader wants it? Written from the format's description (formats/exl2.md 2, 3,
4, 5), with the safetensors library and numpy, without a line of the runtime's reader.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

SUFFIXES = {"q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LETTERS = ("w1", "w3", "w2")


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file; no name twice."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                assert name not in found, name
                found[name] = file.get_tensor(name)
    return found


def linears(config: dict, prefix: str = "model.") -> Iterator[tuple[str, int, int, bool]]:
    """(path, inputs, outputs, biased) of every matrix that a config.json promises, the head last."""
    kind = config["model_type"]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    wide, narrow = heads * dim, config["num_key_value_heads"] * dim
    qkv_bias = bool(config.get("attention_bias")) or kind == "qwen2"
    out_bias = bool(config.get("attention_bias"))
    mlp_bias = bool(config.get("mlp_bias"))
    for i in range(config["num_hidden_layers"]):
        stem = f"{prefix}layers.{i}."
        for name, outputs in zip(ATTENTION[:3], (wide, narrow, narrow), strict=True):
            yield f"{stem}self_attn.{name}", hidden, outputs, qkv_bias
        yield f"{stem}self_attn.o_proj", wide, hidden, out_bias
        inner = config["intermediate_size"]
        if kind == "mixtral":
            blocks = [f"{stem}block_sparse_moe.experts.{e}." for e in range(config["num_local_experts"])]
            names = LETTERS
        elif kind == "qwen3_moe" and i not in config["mlp_only_layers"]:
            blocks = [
                f"{stem}mlp.experts.{e}." for e in range(config.get("num_experts") or config["num_local_experts"])
            ]
            names, inner = MLP, config["moe_intermediate_size"]
        else:
            blocks, names = [f"{stem}mlp."], MLP
        for block in blocks:
            yield f"{block}{names[0]}", hidden, inner, mlp_bias
            yield f"{block}{names[1]}", hidden, inner, mlp_bias
            yield f"{block}{names[2]}", inner, hidden, mlp_bias
    head = prefix.removesuffix("model.") + "lm_head"
    yield head, hidden, config["vocab_size"], False


def check_matrix(group: dict[str, torch.Tensor], inputs: int, outputs: int, biased: bool) -> None:
    """Section 2 and its readers' limits."""
    padded = -(-outputs // 32) * 32
    assert group.keys() == SUFFIXES | ({"bias"} if biased else set())
    dtypes = {"q_scale_max": torch.float16, "q_groups": torch.int16, "bias": torch.float16}
    for suffix, tensor in group.items():
        assert tensor.dtype == dtypes.get(suffix, torch.int32), suffix
    table = group["q_groups"].numpy().astype(np.int64).reshape(-1, 2)
    assert (table >= 0).all()  # read as signed 16 bit by exllamav2
    bits, first = table[:, 0].tolist(), table[:, 1].tolist()
    words = group["q_weight"].shape[0]
    taken = [stop - start for start, stop in zip(first, [*first[1:], words], strict=True)]
    rows = [count * 32 // b for b, count in zip(bits, taken, strict=True)]
    assert first[0] == 0 and all(r > 0 and r % 32 == 0 for r in rows)
    assert all(r * b == 32 * count for r, b, count in zip(rows, bits, taken, strict=True))
    assert set(bits) <= {2, 3, 4, 5, 6, 8} and bits == sorted(bits, reverse=True)
    assert sum(rows) == inputs and inputs % 32 == 0
    assert group["q_weight"].shape == (words, padded)
    assert group["q_scale"].shape == (len(bits), padded // 8)
    assert group["q_scale_max"].shape == (len(bits),) and group["q_scale_max"].isfinite().all()
    assert sorted(group["q_invperm"].tolist()) == list(range(inputs))
    if biased:
        assert group["bias"].shape == (padded,) and group["bias"].isfinite().all()
        assert not group["bias"][outputs:].any()


def dequantize(group: dict[str, torch.Tensor]) -> np.ndarray:
    """float16 (inputs, padded outputs), bit by bit (sections 3 and 4)."""
    words = group["q_weight"].numpy().view(np.uint32)
    scales = group["q_scale"].numpy().view(np.uint32)
    codes4 = ((scales[:, :, None] >> (np.arange(8, dtype=np.uint32) * 4)) & 15).reshape(scales.shape[0], -1) + 1
    top = group["q_scale_max"].numpy()
    table = group["q_groups"].numpy().astype(np.int64).reshape(-1, 2)
    ends = [*table[1:, 1].tolist(), words.shape[0]]
    parts = []
    for g, (bits, start) in enumerate(table.tolist()):
        stream = (words[start : ends[g], None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
        stream = stream.reshape(-1, bits, words.shape[1]).astype(np.int64)  # row, bit, column
        codes = (stream << np.arange(bits)[None, :, None]).sum(axis=1) - (1 << (bits - 1))
        unit = np.float16(np.float32(top[g]) * np.float32(1 / 256))
        scale = (codes4[g] * codes4[g]).astype(np.float16) * unit
        parts.append(codes.astype(np.float16) * scale[None, :])
    return np.concatenate(parts)[group["q_invperm"].numpy()]


def check(folder: Path, *, prefix: str = "model.", extras: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
    """Section 5 for a whole folder. Returns the dense model it stands for, under the names of a dense checkpoint.

    extras: names of tensors that are no part of the language model.
    """
    whole = json.loads((folder / "config.json").read_text())
    config = whole.get("text_config", whole)
    quantization = whole["quantization_config"]
    assert quantization["quant_method"] == "exl2"
    assert isinstance(quantization["version"], str) and isinstance(quantization["bits"], float)
    assert quantization["head_bits"] in (2, 3, 4, 5, 6, 8)
    calibration = quantization["calibration"]
    assert isinstance(calibration["rows"], int) and isinstance(calibration["length"], int) and calibration["dataset"]
    assert not list(folder.glob("*.index.json"))
    stored = read(folder)
    dense: dict[str, torch.Tensor] = {}
    used = set()
    for path, inputs, outputs, biased in linears(config, prefix):
        group = {name.rpartition(".")[2]: t for name, t in stored.items() if name.rpartition(".")[0] == path}
        used |= {f"{path}.{suffix}" for suffix in group}
        check_matrix(group, inputs, outputs, biased)
        values = dequantize(group)
        assert np.isfinite(values).all() and not values[:, outputs:].any()
        dense[f"{path}.weight"] = torch.from_numpy(np.ascontiguousarray(values[:, :outputs].T))
        if biased:
            dense[f"{path}.bias"] = group["bias"][:outputs]
    for name in stored.keys() - used - extras:
        assert "norm" in name or name.endswith((".gate.weight", "embed_tokens.weight")), name  # nothing foreign
        assert stored[name].dtype == torch.float16 and stored[name].isfinite().all(), name
        dense[name] = stored[name]
    assert stored[f"{prefix}embed_tokens.weight"].shape[1] == config["hidden_size"]
    return dense


def stored_bits(folder: Path, layers_only: bool = True) -> int:
    """Bits of the quantized matrices (biases included) as the files hold them."""
    stored = read(folder)
    owners = {name.rpartition(".")[0] for name in stored if name.endswith(".q_weight")}
    return sum(
        8 * tensor.numel() * tensor.element_size()
        for name, tensor in stored.items()
        if name.rpartition(".")[0] in owners and not (layers_only and "lm_head" in name)
    )
