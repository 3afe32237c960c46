"""Which format a module is in, and what the declaration adds."""

import pytest
import torch
from matrices import dense_tensors, exl2_tensors, gptq_tensors

from exl_runtime.errors import FormatError
from exl_runtime.formats import Dense, Exl2, FormatHints, Gptq, LinearShape, dequantize, detect, load_linear
from exl_runtime.formats.hints import FOREIGN_METHODS, GptqHints

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def test_the_marker_tensor_decides() -> None:
    shape = LinearShape(64, 32)
    for tensors, cls in (
        (exl2_tensors([(4, 64)], 32), Exl2),
        (gptq_tensors(4, 64, 32, 32), Gptq),
        (dense_tensors(64, 32), Dense),
    ):
        assert detect(tensors, where="m") is cls
        matrix = load_linear(tensors, shape, where="m", hints=FormatHints())
        assert type(matrix) is cls and matrix.shape == shape and matrix.name == cls.name
        assert torch.equal(matrix.dequantize(), dequantize(tensors))


@pytest.mark.parametrize(
    ("suffixes", "words"),
    [
        ({"q_weight", "qweight"}, ("q_weight (exl2)", "qweight (gptq)")),
        ({"weight", "q_weight", "q_scale"}, ("q_weight (exl2)", "weight (dense)")),
        ({"qweight", "weight"}, ("qweight (gptq)", "weight (dense)")),
        ({"trellis", "suh"}, ("suh, trellis",)),
        (set(), ("nothing",)),
        ({"weight_packed"}, ("weight_packed",)),
    ],
)
def test_none_or_several_markers_are_an_error(suffixes: set[str], words: tuple[str, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        detect(frozenset(suffixes), where="model.layers.3.mlp.up_proj in a.safetensors")
    for word in ("model.layers.3.mlp.up_proj in a.safetensors", *words):
        assert word in str(caught.value)


def test_hints_of_a_checkpoint_are_resolved_by_the_place() -> None:
    tensors = gptq_tensors(4, 64, 32, 32)
    hints = FormatHints.from_json({**GPTQ, "sym": True, "dynamic": {r"+:.*\.up_proj": {"sym": False}}})
    shape = LinearShape(64, 32)
    up = load_linear(tensors, shape, where="model.layers.0.mlp.up_proj in a.safetensors", hints=hints)
    down = load_linear(tensors, shape, where="model.layers.0.mlp.down_proj in a.safetensors", hints=hints)
    assert not torch.equal(up.zeros, down.zeros)  # word against field reading of random zero-points


def test_nothing_declared() -> None:
    for nothing in (None, {}):
        hints = FormatHints.from_json(nothing)
        assert hints.for_module("anything") == GptqHints()
    assert FormatHints.from_json({"bits": 4, "group_size": 64}).for_module("x").group_size == 64
    assert FormatHints.from_json({"quant_method": "exl2", "bits": 4.5, "head_bits": 6}).method == "exl2"


@pytest.mark.parametrize(
    ("extra", "layout"),
    [
        ({}, "gptq"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"checkpoint_format": None, "is_marlin_format": False}, "gptq"),
    ],
)
def test_layouts(extra: dict[str, object], layout: str) -> None:
    assert FormatHints.from_json({**GPTQ, **extra}).gptq.layout == layout


@pytest.mark.parametrize(
    ("quantizer", "carry"),
    [
        (["gptqmodel:7.7.0"], True),
        ("gptqmodel:1.0.0-dev", True),
        (["gptqmodel:0.9.0"], True),
        (["gptqmodel:0.8.9"], False),
        (["auto_gptq:0.7.1"], False),
        (["optimum:1.2", "GPTQModel:10.0"], True),
        ([], False),
        (None, False),
    ],
)
def test_who_wrote_it(quantizer: object, carry: bool) -> None:
    assert FormatHints.from_json({**GPTQ, "meta": {"quantizer": quantizer}}).gptq.carry is carry


def test_dynamic_overrides() -> None:
    hints = FormatHints.from_json(
        {
            **GPTQ,
            "sym": True,
            "dynamic": {
                r"model\.layers\.1\..*": {"group_size": 32, "bits": 8},
                r"+:model\.layers\.1\.mlp.*": {"group_size": 64},
                r".*\.down_proj": {"sym": False},
                r"-:model\.layers\.1\.mlp\.gate_proj": {},
            },
        }
    )
    assert hints.for_module("model.layers.0.mlp.up_proj").group_size == 128
    assert hints.for_module("model.layers.1.mlp.up_proj").group_size == 32  # the first match counts
    assert hints.for_module("model.layers.1.mlp.gate_proj") == hints.gptq  # negative patterns come first
    down = hints.for_module("model.layers.0.mlp.down_proj")
    assert (down.sym, down.group_size) == (False, 128)
    assert hints.for_module("x.model.layers.1.mlp.up_proj") == hints.gptq  # patterns match from the start


@pytest.mark.parametrize("method", sorted(FOREIGN_METHODS))
def test_foreign_methods_are_refused_by_name_with_a_hint(method: str) -> None:
    for key in ("quant_method", "method"):
        with pytest.raises(FormatError, match=method) as caught:
            FormatHints.from_json({key: method.upper(), "bits": 4})
        assert caught.value.hint


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"quant_method": "brand_new"}, "brand_new"),
        ({"quant_method": 4}, "quant_method is 4"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({**GPTQ, "is_marlin_format": True}, "marlin"),
        ({**GPTQ, "checkpoint_format": "bitblas"}, "bitblas"),
        ({**GPTQ, "pack_dtype": "int64"}, "int64"),
        ({**GPTQ, "bits": "four"}, "bits is 'four'"),
        ({**GPTQ, "bits": True}, "bits is True"),
        ({**GPTQ, "sym": "yes"}, "sym is 'yes'"),
        ({**GPTQ, "group_size": 0}, "group_size is 0"),
        ({**GPTQ, "group_size": -2}, "group_size is -2"),
        ({**GPTQ, "group_size": 64.5}, "group_size is 64.5"),
        ({**GPTQ, "dynamic": ["x"]}, "dynamic"),
        ({**GPTQ, "dynamic": {"(": {}}}, "regular expression"),
        ({**GPTQ, "dynamic": {"(.+)+!": {}}}, "repetition"),
        ({**GPTQ, "dynamic": {"x": 4}}, "dynamic"),
        ({**GPTQ, "dynamic": {"x": {"sym": 1}}}, "sym is 1"),
        ({**GPTQ, "meta": "gptqmodel"}, "meta is"),
        ({**GPTQ, "meta": {"quantizer": [7]}}, "quantizer"),
        ([GPTQ], "JSON object"),
    ],
)
def test_malformed_declarations(declared: object, words: str) -> None:
    with pytest.raises(FormatError, match="quantization_config") as caught:
        FormatHints.from_json(declared)
    assert words in str(caught.value)
