"""Declarations as programs in use write them: what is only about the making is ignored, what matters is refused."""

from typing import Any

import pytest

from exl_runtime.errors import FormatError
from exl_runtime.formats import FormatHints
from exl_runtime.formats.hints import GptqHints

BASE = {"bits": 4, "group_size": 128, "desc_act": True, "sym": True}
META = {"damp_percent": 0.05, "damp_auto_increment": 0.01, "static_groups": False, "true_sequential": True, "mse": 0.0}
PLAIN = GptqHints(group_size=128, sym=True)
CARRY = GptqHints(group_size=128, sym=True, carry=True)
OPTIMUM = {
    **BASE,
    "quant_method": "gptq",
    "tokenizer": None,
    "dataset": ["auto-gptq is an easy-to-use library", "c4"],
    "damp_percent": 0.1,
    "true_sequential": True,
    "use_cuda_fp16": False,
    "model_seqlen": 4096,
    "block_name_to_quantize": "model.layers",
    "module_name_preceding_first_block": ["model.embed_tokens"],
    "batch_size": 1,
    "pad_token_id": None,
    "disable_exllama": False,
    "use_exllama": True,
    "max_input_length": None,
    "exllama_config": {"version": 1},
    "cache_block_outputs": True,
    "modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["self_attn.o_proj"]],
}
PUBLISHED: dict[str, tuple[dict[str, Any], GptqHints]] = {
    "the first quantize_config.json": ({"bits": 4, "group_size": 128}, GptqHints(group_size=128)),
    "quantize_config.json of 2023": (
        {**BASE, "damp_percent": 0.1, "model_name_or_path": None, "model_file_base_name": "gptq_model-4bit-128g"},
        PLAIN,
    ),
    "auto-gptq 0.7": (
        {
            **BASE,
            "damp_percent": 0.01,
            "static_groups": False,
            "true_sequential": True,
            "model_name_or_path": "",
            "model_file_base_name": "model",
            "is_marlin_format": False,
            "quant_method": "gptq",
            "checkpoint_format": None,
        },
        PLAIN,
    ),
    "optimum": (OPTIMUM, PLAIN),
    "optimum on gptqmodel": (
        {**OPTIMUM, "backend": "auto", "checkpoint_format": "gptq", "meta": {"quantizer": ["optimum:1.24.0"]}},
        PLAIN,
    ),
    "gptqmodel 5": (
        {
            **BASE,
            "desc_act": False,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "format": "gptq",
            "pack_dtype": "int32",
            "pack_impl": "cpu",
            "dynamic": None,
            "meta": {"quantizer": ["gptqmodel:5.6.12"], "gptaq": False, "act_group_aware": True, **META},
        },
        CARRY,
    ),
    "gptqmodel 7, nulls": (
        {
            **BASE,
            "quant_method": "gptq",
            "method": "gptq",
            "checkpoint_format": "gptq",
            "adapter": None,
            "meta": {"quantizer": ["gptqmodel:7.3.3+ultra"], "damp_percent": None, "fallback": {"strategy": "rtn"}},
        },
        CARRY,
    ),
    "auto-round as gptq": (
        {**BASE, "quant_method": "gptq", "autoround_version": "0.4.2", "iters": 200, "lr": 0.005, "nsamples": 512},
        PLAIN,
    ),
    "auto-round in its own name": (
        {
            "bits": 4,
            "data_type": "int",
            "group_size": 128,
            "sym": True,
            "autoround_version": "0.13.0",
            "block_name_to_quantize": "model.layers",
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "extra_config": {"lm_head": {"bits": 16, "data_type": "fp"}},
        },
        PLAIN,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    declared, wanted = PUBLISHED[name]
    hints = FormatHints.from_json(declared)
    assert hints.method == "gptq"
    assert hints.for_module("model.layers.0.self_attn.q_proj") == wanted


EXL2 = (
    {"quant_method": "exl2", "version": "0.1.8", "bits": 4.25, "head_bits": 6}
    | {"calibration": {"rows": 115, "length": 2048, "dataset": "(default)"}},
    {"quant_method": "exl2", "version": "0.0.13", "bits": 2.4, "head_bits": 6, "calibration": {"dataset": None}},
)


@pytest.mark.parametrize("declared", EXL2, ids=["0.1.8", "0.0.13"])
def test_exl2(declared: dict[str, Any]) -> None:
    assert FormatHints.from_json(declared) == FormatHints(method="exl2")


def test_exceptions_by_path() -> None:
    name = "model.layers.1.mlp.up_proj"
    hints = FormatHints.from_json(
        {**PUBLISHED["auto-round in its own name"][0], "extra_config": {name: {"sym": False}}}
    )
    assert hints.for_module(name) == GptqHints(group_size=128, sym=False)
    for other in ("model.layers.1.mlp.up_projection", "model.layers.11.mlp.up_proj", "model_layers.1.mlp.up_proj"):
        assert hints.for_module(other) == PLAIN


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "auto_round:auto_awq"),
        ({"quant_method": "auto-round"}, "packing_format is None"),
        ({"quant_method": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_marlin"}, "gptq_marlin"),
        ({"quant_method": "awq", "zero_point": True, "version": "gemm"}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_what_means_something_else_is_refused_by_name(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match="quantization_config") as caught:
        FormatHints.from_json({**BASE, **extra})
    assert words in str(caught.value) and caught.value.hint
