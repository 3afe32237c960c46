"""Models with random weights: every format opens, generates sane numbers and has the size asked for."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exl_runtime as exl
from eval.commands import make
from eval.made import folder, linears, twin
from eval.made.folder import Recipe, write_model
from eval.made.shape import PRESETS, Shape, parse_shape
from eval.speed.traffic import spec_of
from exl_runtime.checkpoint import Checkpoint
from exl_runtime.config.spec import MoeSpec
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import EvalError, UsageError
from exl_runtime.formats.base import LinearShape
from exl_runtime.formats.detect import GptqHints
from exl_runtime.formats.exl2 import Exl2
from exl_runtime.formats.gptq import Gptq
from exl_runtime.model.summary import summarize

TINY = Shape(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, vocab=2048, context=256)
GREEDY = exl.SamplingParams(temperature=0.0, ignore_eos=True)
MIXED = Shape(hidden=64, inner=32, layers=2, heads=4, kv_heads=2, vocab=2048, context=256, experts=5, active=2)
RECIPES = {
    "exl2": Recipe(),
    "exl2-group32": Recipe(bits=3.6, group=32),
    "gptq4": Recipe(format="gptq"),
    "gptq3-order": Recipe(format="gptq", bits=3, group=32, act_order=True),
    "gptq8-one-group": Recipe(format="gptq", bits=8, group=-1),
    "fp16": Recipe(format="fp16"),
    "bf16": Recipe(format="bf16"),
}


@pytest.mark.parametrize("shape", [TINY, MIXED], ids=["plain", "experts"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_opens_and_generates_sane_numbers(tmp_path: Path, recipe: Recipe, shape: Shape) -> None:
    write_model(tmp_path / "made", shape, recipe, QuietReporter())
    with exl.load(tmp_path / "made", threads=1) as runtime:
        logits = runtime.logits(range(10, 74))
        result = runtime.generate([5, 6, 7], max_tokens=12, sampling=GREEDY)
    assert logits.shape == (64, shape.vocab)
    assert logits.isfinite().all()
    # The head has unit gain on normed input, so logits have about unit variance; a constant or dead model has none.
    assert 0.8 < float(logits.std()) < 1.25
    assert abs(float(logits.mean())) < 0.1
    assert len(set(logits.argmax(-1).tolist())) > 32, "different tokens give different answers"
    assert result.generated_tokens == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_deep_models_stay_sane(tmp_path: Path) -> None:
    shape = Shape(hidden=64, inner=96, layers=40, heads=4, kv_heads=4, vocab=2048)
    write_model(tmp_path / "made", shape, Recipe(bits=2.7, group=32), QuietReporter())
    with exl.load(tmp_path / "made", context=64, threads=1) as runtime:
        logits = runtime.logits(range(10, 42))
    assert 0.8 < float(logits.std()) < 1.25
    assert len(set(logits.argmax(-1).tolist())) > 16


@pytest.mark.parametrize("shape", [TINY, MIXED], ids=["plain", "experts"])
def test_dense_models_mean_the_same_to_transformers(tmp_path: Path, shape: Shape) -> None:
    transformers = pytest.importorskip("transformers")
    write_model(tmp_path / "made", shape, Recipe(format="fp16"), QuietReporter())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    ids = list(range(100, 130))
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    with exl.load(tmp_path / "made", threads=1) as runtime:
        torch.testing.assert_close(runtime.logits(ids), expected, atol=2e-4, rtol=2e-4)


def test_a_mixture_has_the_experts_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path / "made", MIXED, Recipe(), QuietReporter())
    with Checkpoint.open(tmp_path / "made") as checkpoint:
        orders = [tuple(checkpoint.tensor(name).tolist()) for name in checkpoint.names if name.endswith("q_invperm")]
    assert len(set(orders)) == 1 + 2 * (2 + 2 * 5), "gate and up of one expert share the order of their rows"
    with exl.load(tmp_path / "made", threads=1) as runtime:
        mixture = spec_of(runtime).layers[1].mlp
    assert isinstance(mixture, MoeSpec)
    assert (mixture.experts, mixture.experts_per_token, mixture.intermediate_size) == (5, 2, 32)
    experts = next(kind for kind in summarize(tmp_path / "made").kinds if kind.kind == "experts")
    assert experts.weights == 2 * 5 * 3 * 64 * 32


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0, 4.65, 6.0])
def test_exl2_has_the_bits_asked_for(tmp_path: Path, bits: float) -> None:
    shape = Shape(hidden=256, inner=768, layers=3, heads=4, kv_heads=2, vocab=2048)
    write_model(tmp_path / "made", shape, Recipe(bits=bits, group=64), QuietReporter())
    made = summarize(tmp_path / "made")
    assert made.format == "exl2"
    # The rounding of the last matrix is all that is left over: half a group of one matrix at most.
    assert made.bits_per_weight == pytest.approx(bits, abs=0.02)
    head = next(kind for kind in made.kinds if kind.kind == "head")
    assert head.bits_per_weight == pytest.approx(6.0 + linears.overhead(256, 2048, 2), abs=1e-6)
    with Checkpoint.open(tmp_path / "made") as checkpoint:
        orders = {
            part: checkpoint.tensor(f"model.layers.1.self_attn.{part}_proj.q_invperm").tolist() for part in "qkvo"
        }
        table = checkpoint.tensor("model.layers.0.mlp.gate_proj.q_groups").tolist()
    assert orders["q"] == orders["k"] == orders["v"] != list(range(256)), "matrices of one input share its order"
    assert len(set(table[0::2])) > 1, "several widths in one matrix"


def test_a_real_shape_has_its_real_size() -> None:
    """The bytes a token reads at 4.0 bits and a 6-bit head: 0.535 GB for this shape."""
    shape = PRESETS["1.1b"]
    owed, bits = 0.0, 0.0
    for _ in range(shape.layers):
        for _, inputs, outputs in shape.linears():
            plan = linears.exl2_plan(inputs, outputs, 4.0, 128, owed)
            owed += 4.0 * inputs * outputs - linears.plan_bits(plan, outputs)
            bits += linears.plan_bits(plan, outputs)
    head = linears.plan_bits([(6, 128)] * 16, shape.vocab)
    weights = shape.layers * sum(inputs * outputs for _, inputs, outputs in shape.linears())
    assert bits / weights == pytest.approx(4.0, abs=2e-4)
    assert (bits + head) / 8e9 == pytest.approx(0.535, abs=0.002)


@given(
    inputs=st.integers(1, 40).map(lambda n: 32 * n),
    outputs=st.integers(1, 12).map(lambda n: 32 * n),
    group=st.sampled_from([32, 64, 128]),
    bits=st.floats(2.0, 8.0),
    owed=st.floats(-1e4, 1e4),
)
@settings(max_examples=60, deadline=None)
def test_every_plan_is_one_the_format_takes(inputs: int, outputs: int, group: int, bits: float, owed: float) -> None:
    bits += linears.overhead(inputs, outputs, -(-inputs // group))
    bits = min(bits, 8 + linears.overhead(inputs, outputs, -(-inputs // group)))
    plan = linears.exl2_plan(inputs, outputs, bits, group, owed)
    assert sum(rows for _, rows in plan) == inputs
    assert [width for width, _ in plan] == sorted((width for width, _ in plan), reverse=True)
    tensors = linears.exl2(plan, outputs, 0.1, 1, 2)
    matrix = Exl2.load(tensors, LinearShape(inputs, outputs))
    assert matrix.storage_bits() == linears.plan_bits(plan, outputs)
    assert [(g.bits, g.rows) for g in matrix.groups] == plan
    if owed == 0.0:
        gap = 2 if max(width for width, _ in plan) == 8 else 1  # between neighbouring widths
        short_by = abs(linears.plan_bits(plan, outputs) / (inputs * outputs) - bits)
        assert short_by <= gap * group / inputs / 2 + 1e-9, "the nearest sum of whole groups"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_exl2_weights_have_the_spread_asked_for(bits: int) -> None:
    weight = Exl2.load(linears.exl2([(bits, 128)] * 4, 500, 0.05, 1, 2), LinearShape(512, 500)).dequantize()
    check_spread(weight, 0.05)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_weights_have_the_spread_asked_for(bits: int, act_order: bool) -> None:
    tensors = linears.gptq(512, 512, 0.05, 1, bits=bits, group=128, act_order=act_order, perm_seed=2)
    matrix = Gptq.load(tensors, LinearShape(512, 512), hints=GptqHints(group_size=128, sym=True))
    assert (matrix.group_size is None) == act_order
    assert set(matrix.zeros.unique().tolist()) == {1 << (bits - 1)}
    check_spread(matrix.dequantize(), 0.05)


def check_spread(weight: torch.Tensor, std: float) -> None:
    """Mean 0 within 5 standard errors, columns included; the deviation within 3 percent."""
    count = weight.numel()
    assert float(weight.std()) == pytest.approx(std, rel=0.03)
    assert abs(float(weight.mean())) < 5 * std / math.sqrt(count)
    columns = weight.mean(0)
    assert float(columns.std()) == pytest.approx(std / math.sqrt(weight.shape[0]), rel=0.2), "no column has an offset"


def test_seeds_decide_everything(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_model(tmp_path / name, TINY, Recipe(seed=seed), QuietReporter())
    contents = {name: [path.read_bytes() for path in sorted((tmp_path / name).glob("*.safetensors"))] for name in "abc"}
    assert contents["a"] == contents["b"]
    assert contents["a"][1] != contents["c"][1]


def test_dense_tensors_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "PIECE", 640)
    pieces = list(linears.dense_pieces(100, 64, 1.0, 5, torch.float16))
    assert [piece.shape[0] for piece in pieces] == [10] * 10
    monkeypatch.setattr(linears, "PIECE", 1 << 20)
    (whole,) = linears.dense_pieces(100, 64, 1.0, 5, torch.float16)
    assert torch.equal(torch.cat(pieces), whole), "the size of the pieces does not change the values"


def test_an_interrupted_folder_is_no_model_and_can_be_made_again(tmp_path: Path) -> None:
    class Stops(QuietReporter):
        def _step(self, stage: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "made", TINY, Recipe(), Stops())
    assert not (tmp_path / "made").exists()
    write_model(tmp_path / "made", TINY, Recipe(), QuietReporter())
    assert summarize(tmp_path / "made").format == "exl2"


BAD_SHAPES = (
    "64/96/2/4/2/2048/8",
    "64/96/2/4/2/2048/8/9",
    "64/96/2/4/2/2048/0/1",
    "70b",
    "64/96/2/4",
    "64/96/2/4/2/x",
    "64/96/0/4/2/2048",
    "65/96/2/4/2/2048",
    "64/96/2/5/1/2048",
)
BAD_MIXTURES = ("64/96/2/4/2/2048/8", "64/96/2/4/2/2048/8/9", "64/96/2/4/2/2048/0/1")


@pytest.mark.parametrize("text", [*BAD_SHAPES, "96/96/2/4/3/2048", "64/96/2/4/1/2048", *BAD_MIXTURES])
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"hint: give 1\.1b"):
        parse_shape(text, mixtures=True)


def test_shapes_are_read() -> None:
    assert parse_shape("1.1b") == PRESETS["1.1b"]
    assert parse_shape("8B", layers=2).layers == 2
    assert parse_shape("64/96/2/4/2/2048") == Shape(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, vocab=2048)
    assert parse_shape("1024/512/12/16/4/32000/32/8", mixtures=True) == PRESETS["moe-1b"]
    with pytest.raises(UsageError, match="the shape 'moe-1b' has experts"):
        parse_shape("moe-1b")
    assert PRESETS["8b"].linears()[1] == ("self_attn.k_proj", 4096, 1024)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(bits=1.5), "1.5 bits per weight in EXL2"),
        (Recipe(bits=9.2), "9.2 bits per weight in EXL2"),
        (Recipe(group=48), "an EXL2 group of 48 rows"),
        (Recipe(format="gptq", bits=5), "5 bits per weight in GPTQ"),
        (Recipe(format="gptq", group=0), "a GPTQ group of 0 rows"),
        (Recipe(format="fp16", act_order=True), "--act-order with fp16"),
        (Recipe(format="int4"), "unknown format 'int4'"),
    ],
)
def test_what_a_format_cannot_do_is_said_before_anything_is_written(
    tmp_path: Path, recipe: Recipe, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_model(tmp_path / "made", TINY, recipe, QuietReporter())
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_model(tmp_path / "full", TINY, Recipe(), QuietReporter())
    with pytest.raises(UsageError, match="a file has this name"):
        write_model(tmp_path / "file", TINY, Recipe(), QuietReporter())
    small = Shape(hidden=64, inner=96, layers=1, heads=4, kv_heads=2, vocab=500)
    with pytest.raises(UsageError, match="a vocabulary of 500 is smaller than the tokenizer's 2048"):
        write_model(tmp_path / "small", small, Recipe(), QuietReporter())


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    make.add(parser)
    return parser.parse_args([str(one) for one in given])


def test_command(tmp_path: Path) -> None:
    target = tmp_path / "made"
    outcome = make.run(
        arguments("64/96/3/4/2/2048", "-o", target, "--format", "gptq", "--layers", 1, "--act-order"), QuietReporter()
    )
    assert outcome.code == 0
    assert outcome.facts["format"] == "gptq"
    assert outcome.facts["parameters"] == 2 * 2048 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    config = json.loads((target / "config.json").read_text())
    assert (config["num_hidden_layers"], config["quantization_config"]["desc_act"]) == (1, True)
    with pytest.raises(UsageError, match="nothing to write"):
        make.run(arguments("1.1b"), QuietReporter())


# --- GGUF --------------------------------------------------------------------------------------------------------

GGUF_SHAPE = Shape(hidden=256, inner=512, layers=9, heads=4, kv_heads=2, vocab=2048)


@pytest.mark.parametrize("kind", twin.TYPES)
def test_twin_reads_back(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "twin.gguf"
    twin.write_twin(path, GGUF_SHAPE, kind, 1, QuietReporter())
    assert [entry.name for entry in tmp_path.iterdir()] == ["twin.gguf"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 3 + 9 * GGUF_SHAPE.layers
    assert tensors["output.weight"].tensor_type.name == twin.HEAD[kind]
    for name, inputs, std in (("ffn_up", 256, 1 / 16), ("ffn_down", 512, 1 / math.sqrt(512 * 18))):
        tensor = tensors[f"blk.0.{name}.weight"]
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert weight.shape[1] == inputs
        assert float(weight.std()) == pytest.approx(std, rel=0.04)
        # Each row is one output: none may have an offset that all inputs share.
        assert float(np.std(weight.mean(1))) == pytest.approx(std / math.sqrt(inputs), rel=0.25)
    wide = {name for name, tensor in tensors.items() if tensor.tensor_type.name == "Q6_K"}
    if kind == "Q4_K":
        chosen = {i for i in range(9) if f"blk.{i}.attn_v.weight" in wide}
        assert chosen == {0, 3, 6, 7, 8}
        assert wide == {"output.weight", *(f"blk.{i}.{part}.weight" for i in chosen for part in ("attn_v", "ffn_down"))}


def test_twin_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EvalError, match="GGUF files need the gguf package\n  hint: pip install gguf"):
        twin.write_twin(tmp_path / "twin.gguf", GGUF_SHAPE, "Q4_0", 1, QuietReporter())
    assert not list(tmp_path.iterdir())


def test_twin_of_a_mixture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a GGUF file of a mixture of experts"):
        twin.write_twin(tmp_path / "twin.gguf", MIXED, "Q4_0", 1, QuietReporter())


def test_twin_of_a_shape_that_fits_no_block(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UsageError, match="Q4_K wants a multiple of 256"):
        twin.write_twin(tmp_path / "twin.gguf", TINY, "Q4_K", 1, QuietReporter())
    assert folder.estimate(TINY, Recipe()) > 0
