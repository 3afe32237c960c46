"""Every kind of source becomes an EXL2 folder that obeys the writer's rules and is the model it should be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exl2_rules
import pytest
import tiny
import torch
import torch.nn.functional as F
from breaking import edit_json
from converting import SMALL, Quiet, family, in_a_hurry, options, save_model, tensors, write_tokenizer
from quantize import join_fused, quantize_folder
from safetensors.torch import save_file

import exl_runtime as exl
from convert import tuning
from convert.allocate import attainable
from convert.job import Outcome, run

IDS = [(11 * i * i + 5 * i + 2) % 67 + 3 for i in range(40)]
SIZES = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 83}
MOE = {"num_experts": 3, "moe_intermediate_size": 32, "mlp_only_layers": [1]}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with in_a_hurry():
        yield


def convert(source: Path, out: Path, **changes: Any) -> tuple[Outcome, Quiet]:
    progress = Quiet()
    return run(options(source, out, **changes), progress), progress


def stacked(dense: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Single experts under either spelling -> the stacked parameters of a transformers module."""
    letters = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    out = {name.replace("block_sparse_moe.gate", "mlp.gate"): t for name, t in dense.items() if ".experts." not in name}
    for name, tensor in like.items():
        if ".experts." not in name:
            continue
        stem, part = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        experts = []
        for e in range(tensor.shape[0]):
            single = [f"{stem}.{e}.{p}.weight" for p in parts]
            letter = [f"{stem}.{e}.{letters[p]}.weight".replace("mlp.", "block_sparse_moe.") for p in parts]
            experts.append(torch.cat([dense[n] for n in (single if single[0] in dense else letter)]))
        out[name] = torch.stack(experts)
    return out


def reference(model: Any, dense: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the transformers model on other weights; a tied one gets a head of its own."""
    like = model.state_dict()
    state = stacked({name: t.float() for name, t in dense.items()}, like)
    experts = {name: t for name, t in state.items() if ".experts." in name}
    state = {**join_fused(state, {name: t for name, t in like.items() if name not in experts}), **experts}
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    state["lm_head.weight"] = dense["lm_head.weight"].float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not missing
    return tiny.logits_of(model, IDS)


def ours(folder: Path) -> torch.Tensor:
    """By the reference path, which rounds every weight to half as the format does; the CPU kernels leave that out."""
    with exl.load(folder, device="cpu", backend="reference", context=64, cache="fp32") as runtime:
        return runtime.logits(IDS)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = F.log_softmax(p, -1), F.log_softmax(q, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


CASES = {
    "llama_bias": (torch.float16, {}),
    "mixtral": (torch.bfloat16, {"num_local_experts": 3}),
    "qwen2": (torch.bfloat16, {}),
    "qwen3": (torch.float32, {"head_dim": 24}),
    "qwen3_moe": (torch.float32, MOE),
    "gemma2": (torch.bfloat16, {"head_dim": 24}),
    "gemma3": (torch.float32, {"head_dim": 24}),
    "phi3": (torch.float16, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the rules; the same logits as transformers on the same weights; at 8 bits close to the source."""
    dtype, changes = CASES[name]
    model = tiny.model_of(family(name, **{**SIZES, **changes}))
    source, out, fine = tmp_path / "source", tmp_path / "out", tmp_path / "fine"
    save_model(model, source, dtype, "40KB" if name == "qwen2" else "1GB")
    truth = tiny.logits_of(model, IDS)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (name == "qwen2")
    done, progress = convert(source, out)
    assert not [text for text in progress.warned if "borrowed" not in text]
    dense = exl2_rules.check(out)
    expect_bits(out, done.bits_stored, 5.5)
    logits = ours(out)
    expect_equal(logits, reference(model, dense))
    assert 0 < divergence(truth, logits) < 0.3
    # The measurement of one job serves the next. Rows as few as these cannot judge a tuned model.
    monkeypatch.setattr(tuning, "GUARD_TOKENS", 1024)
    measurement = out / "measurement.json"
    convert(source, fine, bits=highest(out), head_bits=8, measurement=measurement)
    exl2_rules.check(fine)
    assert divergence(truth, ours(fine)) < 0.003
    assert json.loads((fine / "measurement.json").read_text()) == json.loads(measurement.read_text())


def expect_bits(folder: Path, told: float, most: float) -> None:
    """What is told is what the files hold, at most what was wanted."""
    weights = sum(inputs * outputs for _, inputs, outputs, _ in matrices(folder))
    assert told == pytest.approx(exl2_rules.stored_bits(folder) / weights, abs=1e-12)
    assert most - 0.3 < told <= most  # these models have few layouts to choose from


def expect_equal(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((logits - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())


def matrices(folder: Path, prefix: str = "model.") -> list[tuple[str, int, int, bool]]:
    """Those of the decoder layers."""
    config = json.loads((folder / "config.json").read_text())
    return list(exl2_rules.linears(config.get("text_config", config), prefix))[:-1]


def highest(folder: Path) -> float:
    """The bits with which every matrix has 8."""
    return attainable([slot[1:] for slot in matrices(folder)]).highest


# --- other spellings -------------------------------------------------------------------------------------------------


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a folder with other tensors."""
    shutil.copytree(source, target)
    stored = tensors(target)
    for path in target.glob("*.safetensors"):
        path.unlink()
    edit(stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, target / "model.safetensors")
    return target


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of a family, and its folder."""
    model = tiny.model_of(family(name, **{**SIZES, **changes}))
    save_model(model, folder, dtype)
    return model


def test_stacked_experts_become_single_ones(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path / "single", **MOE)

    def stack(stored: dict[str, torch.Tensor]) -> None:
        stem = "model.layers.0.mlp.experts"
        gate, up, down = ([stored.pop(f"{stem}.{e}.{part}.weight") for e in range(3)] for part in exl2_rules.MLP)
        stored[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        stored[f"{stem}.down_proj"] = torch.stack(down)

    source = edited(tmp_path / "single", tmp_path / "stacked", stack)
    convert(tmp_path / "single", tmp_path / "a")
    convert(source, tmp_path / "b")
    assert (tmp_path / "a/output.safetensors").read_bytes() == (tmp_path / "b/output.safetensors").read_bytes()
    expect_equal(ours(tmp_path / "b"), reference(model, exl2_rules.check(tmp_path / "b")))


@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_an_embedding_table_with_more_rows_than_the_vocabulary(name: str, tmp_path: Path) -> None:
    """The table keeps its rows, the head has those of the vocabulary; tied or not."""
    model = saved(name, tmp_path / "source")
    truth = tiny.logits_of(model, IDS)[:, :71]
    edit_json(tmp_path / "source" / "config.json", vocab_size=71)
    write_tokenizer(tmp_path / "source", 71)
    convert(tmp_path / "source", tmp_path / "out", head_bits=8)
    dense = exl2_rules.check(tmp_path / "out")
    assert dense["model.embed_tokens.weight"].shape == (83, 32) and dense["lm_head.weight"].shape == (71, 32)
    assert tensors(tmp_path / "out")["lm_head.q_weight"].shape[1] == 96
    logits = ours(tmp_path / "out")
    padded = {**dense, "lm_head.weight": torch.cat([dense["lm_head.weight"], torch.zeros(12, 32)])}
    expect_equal(logits, reference(model, padded)[:, :71])
    assert divergence(truth, logits) < 0.3


def test_a_vision_model_keeps_its_other_tensors(tmp_path: Path) -> None:
    model = saved("gemma3", tmp_path / "text", torch.bfloat16)
    extras = {
        "vision_tower.post_layernorm.weight": torch.randn(8, 5),
        "vision_tower.position_ids": torch.arange(7),
        "multi_modal_projector.w": torch.eye(3, dtype=torch.bfloat16),
    }

    def wrap(stored: dict[str, torch.Tensor]) -> None:
        for key in list(stored):
            stored[f"language_model.{key}"] = stored.pop(key)
        stored |= extras

    source = edited(tmp_path / "text", tmp_path / "source", wrap)
    inner = json.loads((source / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}, "text_config": inner}
    (source / "config.json").write_text(json.dumps(outer))
    out = tmp_path / "out"
    convert(source, out)
    dense = exl2_rules.check(out, prefix="language_model.model.", extras=frozenset(extras))
    stored = tensors(out)
    for name, tensor in extras.items():
        assert torch.equal(stored[name], tensor.half() if tensor.dtype.is_floating_point else tensor)
    text = {name.removeprefix("language_model."): t for name, t in dense.items() if name.startswith("language_model.")}
    expect_equal(ours(out), reference(model, text))


def test_the_classic_encoder_writes_by_the_same_rules(tmp_path: Path) -> None:
    model = saved("phi3", tmp_path / "source", torch.bfloat16)
    done, _ = convert(tmp_path / "source", tmp_path / "out", encoder="classic")
    dense = exl2_rules.check(tmp_path / "out")
    expect_bits(tmp_path / "out", done.bits_stored, 5.5)
    expect_equal(ours(tmp_path / "out"), reference(model, dense))


# --- quantized sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gptq", "exl2"])
def test_a_quantized_source_is_taken_as_it_is_with_a_warning(kind: str, tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "dense", num_key_value_heads=4)
    settings = {"bits": 4, "group_size": 32, "act_order": True, "symmetric": True, "version": 1}
    source, out = tmp_path / "source", tmp_path / "out"
    held = quantize_folder(tmp_path / "dense", source, kind, **(settings if kind == "gptq" else {}))
    (source / "quantize_config.json").write_text("{}")
    truth = reference(model, held)
    done, progress = convert(source, out, head_bits=8)
    (warning,) = progress.warned
    assert kind.upper() in warning and "loses some more" in warning
    assert warning in done.warnings and warning in (out / "report.md").read_text().replace("\\", "")
    dense = exl2_rules.check(out)
    assert not (out / "quantize_config.json").exists()
    logits = ours(out)
    expect_equal(logits, reference(model, dense))
    fine = tmp_path / "fine"
    convert(source, fine, bits=highest(out), head_bits=8, measurement=out / "measurement.json")
    assert divergence(truth, ours(fine)) < 0.003
