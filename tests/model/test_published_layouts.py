"""Folders as uploads really look: file names, leftovers, padding, buffers, dtypes that transformers would not write."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from breaking import edit_json
from driving import open_model, run
from oracles import INPUT_ROUNDING
from quantize import exl2, quantize_folder
from safetensors.torch import load_file, save_file
from tiny import by_name, logits_of, model_of, write

from exl_runtime.config.read import load_config
from exl_runtime.errors import ExlError, FormatError
from exl_runtime.model.summary import summarize

IDS = [(13 * i * i + 5 * i + 7) % 128 + 3 for i in range(24)]
OPTIONS = {"bits": 4, "group_size": 32, "act_order": True, "symmetric": True, "version": 1}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@cache
def made(root: Path, name: str, kind: str) -> Path:
    """A dense, EXL2 or GPTQ folder with one weight file."""
    dense = write(by_name(name), root)
    if kind == "dense":
        return dense
    target = root / f"{name}-{kind}"
    quantize_folder(dense, target, kind, **(OPTIONS if kind == "gptq" else {}))
    return target


def copy(source: Path, target: Path, edit: Callable[[Tensors], None] | None = None, file: str | None = None) -> Path:
    """The folder again, its tensors edited, its weight file under another name."""
    shutil.copytree(source, target)
    (old,) = target.glob("*.safetensors")
    tensors = load_file(old)
    old.unlink()
    if edit is not None:
        edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / (file or old.name))
    return target


def logits(folder: Path) -> torch.Tensor:
    summarize(folder)  # `exl info` must manage whatever loads
    return run(open_model(folder, "reference"), IDS, [])


def expect_same(folder: Path, original: Path) -> None:
    assert torch.equal(logits(folder), logits(original))


def inv_freq_buffers(tensors: Tensors) -> None:
    for i in range(3):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)


def zero_biases(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".qweight")]:
        tensors[name.replace("qweight", "bias")] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)


def bf16_scales(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name] = tensors[name].bfloat16()


def float_norms(tensors: Tensors) -> None:
    for name in [name for name in tensors if "norm" in name]:
        tensors[name] = tensors[name].float()


def long_indices(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        tensors[name] = tensors[name].long()


def extra_buffers(tensors: Tensors) -> None:
    """`wf`, the shifts that early versions of one program saved with every matrix."""
    for name in [name for name in tensors if name.endswith(".qweight")]:
        tensors[name.replace("qweight", "wf")] = torch.arange(0, 32, 4, dtype=torch.int32)[None]


GPTQ_EDITS = (inv_freq_buffers, zero_biases, float_norms, long_indices, extra_buffers)


def test_a_stale_declaration_beside_exl2_weights(root: Path, tmp_path: Path, caplog) -> None:
    original = made(root, "llama", "exl2")
    folder = copy(original, tmp_path / "stale")
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    expect_same(folder, original)
    assert "declares fp8" in caplog.text


@pytest.mark.parametrize("edit", GPTQ_EDITS, ids=lambda edit: edit.__name__)
def test_gptq_with(edit: Callable[[Tensors], None], root: Path, tmp_path: Path) -> None:
    source = made(root, "llama", "gptq")
    expect_same(copy(source, tmp_path / "m", edit, "gptq_model-4bit-128g.safetensors"), source)


def test_gptq_with_bf16_scales(root: Path, tmp_path: Path) -> None:
    source = made(root, "llama", "gptq")

    def rounded(tensors: Tensors) -> None:
        bf16_scales(tensors)
        tensors.update({name: tensor.half() for name, tensor in tensors.items() if name.endswith(".scales")})

    assert torch.equal(logits(copy(source, tmp_path / "a", bf16_scales)), logits(copy(source, tmp_path / "b", rounded)))


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "phi3"])
def test_gptq_families(name: str, root: Path) -> None:
    """Dense routers, real biases, fused projections with one g_idx: against the same folder dequantized."""
    source = made(root, name, "gptq")
    state = quantize_folder(made(root, name, "dense"), root / f"{name}-again", "gptq", **OPTIONS)
    dense = root / f"{name}-dequantized"
    shutil.copytree(made(root, name, "dense"), dense)
    for path in dense.glob("*.safetensors"):
        path.unlink()
    save_file({key: value.contiguous() for key, value in state.items()}, dense / "model.safetensors")
    torch.testing.assert_close(logits(source), logits(dense), rtol=1e-4, atol=1e-4)


STALE = {f"model.layers.{i}.self_attn.q_proj.weight": f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)}


@pytest.mark.parametrize("kind", ["gptq", "exl2", "dense"])
def test_a_stale_index(kind: str, root: Path, tmp_path: Path) -> None:
    """The index of the sharded original beside one file that holds everything."""
    source = made(root, "llama", kind)
    folder = copy(source, tmp_path / "m", None, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": STALE}))
    expect_same(folder, source)


def test_what_a_conversion_leaves_behind(root: Path, tmp_path: Path) -> None:
    source = made(root, "llama", "exl2")
    folder = copy(source, tmp_path / "m")
    rows = {"row.00000": torch.zeros(4, 8), "row.00001": torch.ones(4, 8)}
    save_file({"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, folder / "cal_data.safetensors")
    save_file(rows, folder / "hidden_states.safetensors")
    save_file(rows, folder / "input_states.safetensors")
    (folder / "out_tensor").mkdir()
    save_file({"q_weight": torch.zeros(4, 32, dtype=torch.int32)}, folder / "out_tensor" / "lm_head.safetensors")
    (folder / "measurement.json").write_text("{}")
    (folder / "job_new.json").write_text("not json at all")
    expect_same(folder, source)


def test_exl2_split_and_renamed(root: Path, tmp_path: Path) -> None:
    source = made(root, "llama", "exl2")
    folder = copy(source, tmp_path / "m")
    (old,) = folder.glob("*.safetensors")
    tensors = sorted(load_file(old).items())
    old.unlink()
    for part in range(2):
        save_file(dict(tensors[part::2]), folder / f"output-0000{part + 1}-of-00002.safetensors")
    expect_same(folder, source)


def test_exl2_of_a_tied_model_uses_its_own_head(backend: str, root: Path, tmp_path: Path) -> None:
    """The converter quantizes the table once more as `lm_head`; the embedding stays as it is."""
    source = made(root, "gemma2", "exl2")
    values = {}

    def with_head(tensors: Tensors) -> None:
        table = tensors["model.embed_tokens.weight"].float().numpy().T
        head, values["head"] = exl2(table, [(6, 32), (5, 32)], 3, rounded=backend != "cpu")
        tensors.update({f"lm_head.{suffix}": tensor for suffix, tensor in head.items()})

    def dense_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = torch.from_numpy(values["head"].T.copy())

    ours = run(open_model(copy(source, tmp_path / "a", with_head), backend), IDS, [])
    # On one backend the layers below are the same, to the bit. A packed head rounds its inputs (`oracles.py`); no logit
    # should be off by more than 6 standard deviations of that, and the softcap makes none larger.
    wanted = run(open_model(copy(source, tmp_path / "b", dense_head), backend), IDS, [])
    close = {"reference": 0.0, "cpu": 6 * INPUT_ROUNDING}[backend]
    assert float((ours - wanted).abs().max()) <= close * float(wanted.square().mean().sqrt())
    assert (ours - logits(source)).abs().max() > 1e-1  # the two heads differ


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("kind", ["dense", "exl2", "gptq"])
def test_the_language_model_inside_a_vision_model(kind: str, prefix: str, root: Path, tmp_path: Path) -> None:
    source = made(root, "gemma3", kind)

    def renamed(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(8)
        tensors["multi_modal_projector.mm_input_projection_weight"] = torch.ones(8, 64)

    folder = copy(source, tmp_path / "m", renamed)
    text = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}}
    if "quantization_config" in text:
        outer["quantization_config"] = text.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": text}))
    expect_same(folder, source)


@pytest.mark.parametrize("kind", ["dense", "exl2", "gptq"])
def test_vocabulary_padded_beyond_the_configuration(kind: str, root: Path, tmp_path: Path) -> None:
    """Tables of 131 rows under a vocab_size of 100: ids beyond it cannot be drawn, all others are as before."""
    source = made(root, "llama", kind)
    folder = copy(source, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    ids = [i % 100 for i in IDS]
    ours = run(open_model(folder, "reference"), ids, [])
    assert ours.shape[1] == 100
    torch.testing.assert_close(ours, run(open_model(source, "reference"), ids, [])[:, :100], rtol=1e-5, atol=1e-5)


def test_a_smaller_table_is_refused(root: Path, tmp_path: Path) -> None:
    folder = copy(made(root, "llama", "dense"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 132}))
    with pytest.raises(FormatError, match="embedding table"):
        open_model(folder, "reference")


def test_tied_without_a_head(root: Path, tmp_path: Path) -> None:
    folder = copy(made(root, "qwen2", "dense"), tmp_path / "m", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ExlError, match="lm_head"):
        open_model(folder, "reference")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = model_of(by_name("qwen2"))
    model.lm_head.weight = model.model.embed_tokens.weight
    torch.testing.assert_close(logits(folder), logits_of(model, IDS), rtol=1e-4, atol=1e-4)


def mixed_dtypes(tensors: Tensors) -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].bfloat16().to(torch.bfloat16 if "norm" in name else kinds[number % 4])


def test_dtypes_mixed_inside_one_model(backend: str, root: Path, tmp_path: Path) -> None:
    """bfloat16 norms among half matrices, and more: every value is one that bfloat16 holds, up to half's range."""
    source = made(root, "llama", "dense")
    folder = copy(source, tmp_path / "mixed", mixed_dtypes)

    def rounded(tensors: Tensors) -> None:
        mixed_dtypes(tensors)
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    plain = copy(source, tmp_path / "plain", rounded)
    ours, wanted = run(open_model(folder, backend), IDS, []), run(open_model(plain, backend), IDS, [])
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_the_declaration_beside_the_configuration(root: Path, tmp_path: Path) -> None:
    """quantize_config.json only, as all uploads were before configurations had a block for it."""
    source = made(root, "llama", "gptq")
    folder = copy(source, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    block = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    old = {key: block[key] for key in ("bits", "group_size", "desc_act", "sym")}
    (folder / "quantize_config.json").write_text(json.dumps({**old, "model_file_base_name": "model"}))
    assert load_config(folder).quantization["group_size"] == 32
    expect_same(folder, source)
