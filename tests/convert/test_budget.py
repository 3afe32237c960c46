"""Bits out of memory: against sums made by hand, real files, and the definition of "largest"."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from convert.budget import Budget, bits_for_memory, describe, planned_context
from convert.options import JobOptions, validated
from convert.source import Source
from exl_runtime.cache.names import FLOATS, SHORT
from exl_runtime.cache.types import FP16
from exl_runtime.checkpoint import Checkpoint
from exl_runtime.checkpoint.reader import DTYPES
from exl_runtime.config import ModelSpec, resolve
from exl_runtime.console.sizes import parse_size
from exl_runtime.errors import ConvertError
from exl_runtime.model.placement import plan, working_bytes
from exl_runtime.model.summary import summarize

GB = 10**9
# Sizes of a known model of 8 billion parameters, by hand: 32 layers, 8 key/value heads of 128, vocabulary 128256.
EIGHT = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LAYERS = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
# 5 groups of 128 rows at 8 bits (15 % of 4096, rounded up), 27 of 6; per group 4 bits a column, 48 more; 32 a row.
HEAD_6 = (128256 * 128 * (5 * 8 + 27 * 6) + 32 * (4 * 128256 + 48) + 32 * 4096) // 8
DENSE = 2 * (128256 * 4096 + 65 * 4096)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return resolve(EIGHT)


def chosen(spec: ModelSpec, memory: int, context: int = 8192, cache: str = "fp16", **more: float) -> Budget:
    settings = {"head_bits": 6, "embedding_rows": 128256, "parameters": LAYERS, **more}
    return bits_for_memory(spec, memory=memory, context=context, cache=cache, **settings)


@pytest.mark.parametrize(
    ("cache", "bits"),
    [("fp32", 32), ("fp16", 16), ("bf16", 16), ("q8", 8.5), ("q6", 6.5), ("k6v4", 5.5), ("q4", 4.5), ("k2v3", 3.0)],
)
def test_the_sum_by_hand(spec: ModelSpec, cache: str, bits: float) -> None:
    budget = chosen(spec, 8 * GB, cache=cache)
    values = 2 * 32 * 8 * 128  # keys and values of one token
    tokens = 8192 + 256  # whole pages and one to copy
    assert budget.cache_bytes == tokens * values * bits / 8
    assert budget.working_bytes == working_bytes(spec)
    room = 8 * GB - DENSE - HEAD_6 - budget.cache_bytes - budget.working_bytes
    assert budget.bits == math.floor(1000 * 8 * room / LAYERS) / 1000
    assert budget.weight_bytes == DENSE + HEAD_6 + math.ceil(LAYERS * round(1000 * budget.bits) / 8000)


@pytest.mark.parametrize("memory", [6 * GB, 8 * GB, 7 * 2**30, 7_654_321_987])
def test_the_largest_that_fits(spec: ModelSpec, memory: int) -> None:
    budget = chosen(spec, memory)
    assert 2 < budget.bits < 8 and not budget.limited
    assert budget.total_bytes <= memory < budget.total_bytes + LAYERS / 8 * 0.001 + 1
    assert chosen(spec, budget.total_bytes).bits == budget.bits
    assert chosen(spec, budget.total_bytes - 1).bits < budget.bits


def test_more_memory_and_cheaper_caches_mean_more_bits(spec: ModelSpec) -> None:
    rising = [chosen(spec, memory).bits for memory in range(5 * GB, 9 * GB, GB // 2)]
    assert rising == sorted(rising) and rising[0] < rising[-1]
    by_cache = [chosen(spec, 7 * GB, cache=cache).bits for cache in ("fp32", "fp16", "q8", "q6", "q4")]
    assert by_cache == sorted(by_cache) and len(set(by_cache)) == 5
    assert chosen(spec, 7 * GB, head_bits=8).bits < chosen(spec, 7 * GB, head_bits=2).bits


def test_a_real_exl2_folder_would_get_the_bits_it_has(demo: Path) -> None:
    with Source.open(demo) as source, Checkpoint.open(demo) as checkpoint:
        sizes = {
            name: math.prod(info.shape) * DTYPES[info.dtype].itemsize
            for name in checkpoint.names
            for info in [checkpoint.info(name)]
        }
        layers = sum(size for name, size in sizes.items() if "_proj." in name)
        head = sum(size for name, size in sizes.items() if name.startswith("lm_head"))
        dense = sum(sizes.values()) - layers - head
        spec, parameters = source.spec, source.parameters
        rows = checkpoint.info("model.embed_tokens.weight").shape[0]
    settings = {"context": 512, "cache": "fp16", "head_bits": 6, "embedding_rows": rows, "parameters": parameters}
    budget = bits_for_memory(spec, memory=20_000_000, lowest=0.0, highest=0.0, **settings)
    ours = budget.weight_bytes - dense  # at zero bits only the head is left: it is of another setting in the demo
    memory = layers + dense + ours + budget.cache_bytes + budget.working_bytes
    again = bits_for_memory(spec, memory=memory, **settings)
    assert again.bits == math.floor(8000 * layers / parameters) / 1000
    assert 0 < ours < 1.2 * head
    assert plan(spec, context=512, weight_bytes=0, cache=FP16).cache_bytes == budget.cache_bytes


def test_every_cache_of_the_runtime_counts_as_much_as_exl_info_says(demo: Path, tmp_path: Path) -> None:
    kinds = [*FLOATS, *SHORT, *(f"k{keys}v{values}" for keys in range(2, 9) for values in range(2, 9))]
    with Source.open(demo) as source:
        settings = {"head_bits": 6, "embedding_rows": 2048, "parameters": source.parameters, "context": 512}
        for kind in kinds:
            budget = bits_for_memory(source.spec, memory=10**9, cache=kind, **settings)
            shown = summarize(demo, 512, cache=kind)
            assert (budget.cache_bytes, budget.working_bytes) == (shown.cache_bytes, shown.working_bytes), kind
            assert validated(JobOptions(source=demo, out=tmp_path / "out", target_vram=10**9, cache=kind)).cache == kind


@pytest.mark.parametrize("name", ["llama_bias", "qwen2", "qwen3_moe", "gemma2", "mixtral"])
def test_what_stays_dense_is_counted(name: str, tmp_path: Path) -> None:
    with Source.open(tiny.write(tiny.by_name(name), tmp_path)) as source:
        spec = source.spec
        dense = sum(
            2 * tensor.numel()
            for layer in spec.layers
            for key, tensor in source.layer(layer.index).items()
            if key.endswith((".bias", "norm", "router"))
        )
        dense += 2 * source.embedding().numel() + 2 * source.final_norm().numel()
        settings = {"head_bits": 4, "embedding_rows": source.embedding().shape[0], "parameters": source.parameters}
    budget = bits_for_memory(spec, memory=10**9, context=1, cache="fp32", lowest=0, highest=0, **settings)
    blocks = (1, 1)  # of 32 rows: 15 % of 64 rounded up at 6 bits, the rest at 4
    padded = -(-spec.vocab_size // 32) * 32
    head = (32 * padded * (6 * blocks[0] + 4 * blocks[1]) + 2 * (4 * padded + 48) + 32 * 64) // 8
    assert spec.hidden_size == 64 and budget.weight_bytes == dense + head


def test_bits_stay_inside_what_the_model_can_have(spec: ModelSpec) -> None:
    most = chosen(spec, 80 * GB, highest=8.031)
    assert most.bits == 8.031 and most.limited and most.total_bytes < 12 * GB
    assert chosen(spec, 80 * GB).bits == 8.0
    text = describe(most)
    assert "8.031 bits per weight, the most this model can be stored with" in text and "of 80.00 GB" in text
    with pytest.raises(ConvertError, match=r"at 3\.500 bits"):
        chosen(spec, 5 * GB, lowest=3.5)


def test_the_choice_is_described(spec: ModelSpec) -> None:
    budget = chosen(spec, 8 * GB)
    (line,) = describe(budget).splitlines()
    for part in (f"{budget.bits:.3f} bits", "8192 tokens of fp16 cache", "1.11 GB", "head at 6 bits", "8.00 GB"):
        assert part in line
    (line,) = describe(chosen(spec, 8 * 2**30, cache="q8")).splitlines()
    assert "8.00 GiB" in line and "8192 tokens of q8 cache" in line


@pytest.mark.parametrize(
    ("memory", "context", "cache"),
    [
        (4 * GB, 8192, "fp16"),
        (5 * GB, 131072, "fp16"),
        (5 * 2**30, 32768, "fp32"),
        (GB, 256, "q4"),
        (10**6, 8192, "q8"),
    ],
)
def test_what_does_not_fit_and_what_would(spec: ModelSpec, memory: int, context: int, cache: str) -> None:
    with pytest.raises(ConvertError, match="does not hold this model") as caught:
        chosen(spec, memory, context, cache)
    assert f"the {cache} cache of {context} tokens" in caught.value.problem
    hint = caught.value.hint
    for flag, value in re.findall(r"--(\S+) (\S+)", hint):
        changed = {"memory": memory, "context": context, "cache": cache}
        name = "memory" if flag == "target-vram" else flag
        changed[name] = {"memory": parse_size, "context": int, "cache": str}[name](value)
        assert chosen(spec, **changed).bits >= 2.0  # the advice is true
        if flag == "context":
            with pytest.raises(ConvertError):  # and not timid
                chosen(spec, **{**changed, "context": int(value) + 256})
    assert "--target-vram" in hint
    assert ("--context" in hint) == (memory >= 4 * GB)


def test_advice_for_small_models_is_in_megabytes(demo: Path) -> None:
    with Source.open(demo) as source:
        settings = {"head_bits": 6, "embedding_rows": 2048, "parameters": source.parameters}
        with pytest.raises(ConvertError, match="together") as caught:
            bits_for_memory(source.spec, memory=10**6, context=1024, cache="fp16", **settings)
        (size,) = re.findall(r"--target-vram (\S+MB) would do", caught.value.hint)
        memory = parse_size(size)
        assert bits_for_memory(source.spec, memory=memory, context=1024, cache="fp16", **settings).bits < 2.1


def test_settings_that_do_not_exist(spec: ModelSpec) -> None:
    with pytest.raises(ConvertError, match="--cache q5"):
        chosen(spec, 8 * GB, cache="q5")
    with pytest.raises(ConvertError, match="--head-bits 7"):
        chosen(spec, 8 * GB, head_bits=7)


def test_the_context_to_plan_for(spec: ModelSpec) -> None:
    assert planned_context(spec, None) == 8192 and planned_context(spec, 100_000) == 100_000
    assert planned_context(replace(spec, context_length=2048), None) == 2048
    with pytest.raises(ConvertError, match="ends at 131072 tokens"):
        planned_context(spec, 131073)
