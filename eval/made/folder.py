"""A model folder with random weights that `exl_runtime.load` opens: weights in shards, configuration, a tokenizer.

The tokenizer is that of the bundled demo; a larger vocabulary only has ids without a text. Written into
`<target>.partial`, which takes the target's name at the end. A layer is made, written and dropped: memory does not
grow with the model.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from exl_runtime.checkpoint.index import INDEX_FILE
from exl_runtime.checkpoint.writer import Planned, planned_tensor, write_planned
from exl_runtime.config.archs import ARCHS
from exl_runtime.config.names import Names
from exl_runtime.config.read import read_object
from exl_runtime.config.resolve import resolve
from exl_runtime.console.progress import Progress
from exl_runtime.errors import UsageError
from exl_runtime.files import PARTIAL, naming, remove_partials, require_space, sync_folder, write_bytes, write_json
from exl_runtime.model.summary import summarize
from exl_runtime.runtime.load import DEMO_FOLDER

from . import linears
from .shape import Shape

FORMATS = ("exl2", "gptq", "fp16", "bf16")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HEAD_BITS = 6
COPIED = ("tokenizer.json", "chat_template.jinja", "generation_config.json")
BITS = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How weights are stored. bits: average of the decoder layers, all overhead included (EXL2); the width (GPTQ).

    group  rows that share scales; None: 128; -1 (GPTQ only): all rows
    """

    format: str = "exl2"
    bits: float = BITS
    group: int | None = None
    act_order: bool = False
    seed: int = 0

    @property
    def rows(self) -> int:
        return linears.GROUP if self.group is None else self.group

    def check(self, shape: Shape) -> None:
        """Raise UsageError for what the format cannot do."""
        if self.format not in FORMATS:
            raise UsageError(f"unknown format {self.format!r}", hint=f"use one of {', '.join(FORMATS)}")
        if self.act_order and self.format != "gptq":
            raise UsageError(f"--act-order with {self.format}", hint="activation order is a property of GPTQ")
        if self.format == "gptq":
            linears.check_gptq(self.bits, self.rows)
        if self.format == "exl2":
            for _, inputs, outputs in shape.linears():
                linears.exl2_plan(inputs, outputs, self.bits, self.rows)


def write_model(target: Path, shape: Shape, recipe: Recipe, progress: Progress) -> None:
    """Write the folder `target`, which must not exist or be empty. Raises UsageError or StorageError."""
    recipe.check(shape)
    vocabulary = _demo("config.json")["vocab_size"]
    if shape.vocab < vocabulary:
        raise UsageError(
            f"a vocabulary of {shape.vocab} is smaller than the tokenizer's {vocabulary}",
            hint=f"give {vocabulary} or more",
        )
    _require_free(target)
    partial = target.with_name(target.name + PARTIAL)
    with naming(partial):
        partial.mkdir(parents=True, exist_ok=True)
    remove_partials(partial)
    require_space(partial, estimate(shape, recipe), "the model")
    stem = "output" if recipe.format == "exl2" else "model"
    total = shape.layers + 2
    places: dict[str, str] = {}
    nbytes = 0
    with progress.stage(f"making {target.name}", total, "files") as steps:
        for number, shard in enumerate(_shards(shape, recipe), 1):
            name = f"{stem}-{number:05d}-of-{total:05d}.safetensors"
            write_planned(partial / name, shard, {"format": "pt"})
            places.update((entry.name, name) for entry in shard)
            nbytes += sum(entry.nbytes for entry in shard)
            del shard
            steps.advance()
    if recipe.format != "exl2":  # readers of EXL2 look into the files, others want to be told
        write_json(partial / INDEX_FILE, {"metadata": {"total_size": nbytes}, "weight_map": places})
    for name in COPIED:
        write_bytes(partial / name, (DEMO_FOLDER / name).read_bytes())
    write_json(partial / "tokenizer_config.json", {**_demo("tokenizer_config.json"), "model_max_length": shape.context})
    write_json(partial / "config.json", config(shape, recipe))
    with naming(target):
        os.rename(partial, target)
        sync_folder(target.absolute().parent)
    summarize(target)  # what was written can be read


def config(shape: Shape, recipe: Recipe) -> dict[str, object]:
    """The config.json: the demo's, with these sizes; with experts, that of a family in which every layer has some."""
    base = _demo("config.json")
    if shape.experts:
        family = next(arch.hf for arch in ARCHS.values() if arch.moe == "all")
        base["architectures"] = [family]
        base["model_type"] = family.removesuffix("ForCausalLM").lower()
        base |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.active, "sliding_window": None}
    base.update(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rope_theta=shape.rope_theta,
        torch_dtype="bfloat16" if recipe.format == "bf16" else "float16",
    )
    base.pop("quantization_config", None)
    if recipe.format == "exl2":
        base["quantization_config"] = {
            "quant_method": "exl2",
            "bits": recipe.bits,
            "head_bits": HEAD_BITS,
            "calibration": {"rows": 0, "length": 0, "dataset": "(random weights)"},
        }
    if recipe.format == "gptq":
        base["quantization_config"] = {
            "quant_method": "gptq",
            "bits": int(recipe.bits),
            "group_size": recipe.rows,
            "desc_act": recipe.act_order,
            "sym": True,
            "checkpoint_format": "gptq",
        }
    return base


def estimate(shape: Shape, recipe: Recipe) -> int:
    """Bytes of the weights, within a few percent."""
    layer = sum(inputs * outputs for _, inputs, outputs in shape.linears())
    table = shape.vocab * shape.hidden
    quantized = recipe.format in ("exl2", "gptq")
    head = HEAD_BITS + 0.2 if recipe.format == "exl2" else 16
    routers = 16 * shape.layers * shape.experts * shape.hidden
    return int((layer * shape.layers * (recipe.bits + 0.3 if quantized else 16) + table * (16 + head) + routers) / 8)


def _shards(shape: Shape, recipe: Recipe) -> Iterator[Sequence[Planned]]:
    """The embedding with the last norm, every layer, the head: one file each."""
    dtype = DTYPES.get(recipe.format, torch.float16)
    seeds = _seeds(recipe.seed)

    def norm(name: str) -> Planned:
        return planned_tensor(name, torch.ones(shape.hidden, dtype=dtype))

    def dense(name: str, rows: int, columns: int, std: float) -> Planned:
        seed = next(seeds)
        return Planned(
            name=name,
            dtype=dtype,
            shape=(rows, columns),
            make=lambda: linears.dense_pieces(rows, columns, std, seed, dtype),
        )

    yield [
        dense("model.embed_tokens.weight", shape.vocab, shape.hidden, 1.0),
        norm("model.norm.weight"),
    ]
    matrix = _Matrices(recipe, seeds, dense)
    names = resolve(config(shape, recipe)).names
    assert isinstance(names, Names)
    for layer in range(shape.layers):
        path = f"model.layers.{layer}"
        planned = [norm(f"{path}.input_layernorm.weight"), norm(f"{path}.post_attention_layernorm.weight")]
        if shape.experts:
            router = names.router(layer)[0].path
            planned.append(dense(f"{router}.weight", shape.experts, shape.hidden, 1 / math.sqrt(shape.hidden)))
        orders = {group: next(seeds) for group in dict.fromkeys(_group(name) for name, _, _ in shape.linears())}
        for name, inputs, outputs in shape.linears():
            # Two such sums join the residual stream in every layer: its variance at most doubles over all of them.
            joins = name.endswith(("o_proj", "down_proj"))
            std = 1 / math.sqrt(inputs * (2 * shape.layers if joins else 1))
            planned += matrix(_path(names, layer, name), inputs, outputs, std, orders[_group(name)])
        yield planned
    std = 1 / math.sqrt(shape.hidden)
    if recipe.format == "exl2":
        plan = [(HEAD_BITS, min(linears.GROUP, shape.hidden - r)) for r in range(0, shape.hidden, linears.GROUP)]
        tensors = linears.exl2(plan, shape.vocab, std, next(seeds), next(seeds))
        yield [planned_tensor(f"lm_head.{suffix}", tensor) for suffix, tensor in tensors.items()]
    else:
        yield [dense("lm_head.weight", shape.vocab, shape.hidden, std)]


def _group(name: str) -> str:
    """Equal for matrices of one input, which share the order of its rows."""
    room, part = name.rsplit(".", 1)
    return name if part in ("o_proj", "down_proj") else room


def _path(names: Names, layer: int, name: str) -> str:
    """What the checkpoint calls a matrix of `Shape.linears`."""
    room, part = name.rsplit(".", 1)
    if room.startswith("mlp.experts."):
        return names.expert_linear(layer, int(room.rsplit(".", 1)[1]), part)[0].path
    return names.linear(layer, part)[0].path


class _Matrices:
    """Draws one matrix after another; keeps the EXL2 average on its target over all of them."""

    def __init__(self, recipe: Recipe, seeds: Iterator[int], dense: Callable[[str, int, int, float], Planned]) -> None:
        self._recipe = recipe
        self._seeds = seeds
        self._dense = dense
        self._owed = 0.0

    def __call__(self, path: str, inputs: int, outputs: int, std: float, order: int) -> list[Planned]:
        recipe = self._recipe
        if recipe.format == "exl2":
            plan = linears.exl2_plan(inputs, outputs, recipe.bits, recipe.rows, self._owed)
            self._owed += recipe.bits * inputs * outputs - linears.plan_bits(plan, outputs)
            tensors = linears.exl2(plan, outputs, std, next(self._seeds), order)
        elif recipe.format == "gptq":
            tensors = linears.gptq(
                inputs,
                outputs,
                std,
                next(self._seeds),
                bits=int(recipe.bits),
                group=recipe.rows,
                act_order=recipe.act_order,
                perm_seed=order,
            )
        else:
            return [self._dense(f"{path}.weight", outputs, inputs, std)]
        return [planned_tensor(f"{path}.{suffix}", tensor) for suffix, tensor in tensors.items()]


def _seeds(seed: int) -> Iterator[int]:
    number = 0
    while True:
        yield seed * 1_000_003 + number
        number += 1


def _demo(name: str) -> dict[str, object]:
    value = read_object(DEMO_FOLDER / name)
    assert value is not None, f"the bundled demo has no {name}"
    return dict(value)


def _require_free(target: Path) -> None:
    with naming(target):
        if target.is_file():
            raise UsageError(f"{target}: a file has this name", hint="choose another name")
        if target.is_dir() and any(target.iterdir()):
            raise UsageError(f"{target}: exists and is not empty", hint="choose another name, or remove it")
