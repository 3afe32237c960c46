"""What the quantizer reads: every family, spelling and format against the tensors in the files themselves."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from breaking import edit_json
from quantize import Tensors, quantize_folder, split_fused
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, by_name, write

from convert.source import Slot, Source
from exl_runtime.config import MoeSpec
from exl_runtime.errors import CheckpointError, FormatError, NonFiniteError

GPTQ = {"bits": 4, "group_size": 32, "act_order": True, "symmetric": False, "version": 1}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


def state_of(folder: Path) -> Tensors:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def edited(source: Path, target: Path, edit: Callable[[Tensors], None]) -> Path:
    shutil.copytree(source, target)
    tensors = state_of(target)
    (path,) = target.glob("*.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return target


def all_slots(source: Source) -> list[Slot]:
    return [slot for layer in source.spec.layers for slot in source.slots(layer.index)]


def expect(source: Source, state: Tensors) -> None:
    """Everything in `source` equals `state`, a dense state under the names of an EXL2 folder."""
    used = set()
    for layer in source.spec.layers:
        held = source.layer(layer.index)
        wanted = {}
        for slot in source.slots(layer.index):
            wanted[slot.key] = state[f"{slot.path}.weight"].float().t()
            assert wanted[slot.key].shape == (slot.inputs, slot.outputs)
            used.add(f"{slot.path}.weight")
            if slot.biased:
                wanted[f"{slot.key}.bias"] = state[f"{slot.path}.bias"].float()
                used.add(f"{slot.path}.bias")
        for name, key in source.dense_tensors(layer.index).items():
            wanted[key] = state[name].float().t() if key == "router" else state[name].float()
            used.add(name)
        assert held.keys() == wanted.keys()
        for key, tensor in held.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, wanted[key]), key
        assert source.layer_bytes(layer.index) == sum(4 * tensor.numel() for tensor in held.values())
    outside = {key: name for name, key in source.dense_tensors(None).items()}
    assert torch.equal(source.embedding(), state[outside["embedding"]].float())
    assert torch.equal(source.final_norm(), state[outside["final_norm"]].float())
    head = state.get(f"{source.head_slot.path}.weight", state[outside["embedding"]])
    assert torch.equal(source.head(), head.float().t())
    assert source.head_is_embedding == ("lm_head.weight" not in state)
    assert state.keys() - used <= {*outside.values(), "lm_head.weight"}  # nothing of the model is left over


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_dense_families(family, root: Path) -> None:
    folder = write(family, root)
    config = json.loads((folder / "config.json").read_text())
    with Source.open(folder) as source:
        expect(source, split_fused(state_of(folder), config))
        assert source.formats == {"dense"}
        assert source.extra_tensors() == ()
        one = source.slots(1)[-1]
        assert torch.equal(source.matrix(one), source.layer(1)[one.key])
        assert torch.equal(source.matrix(source.head_slot), source.head())


@cache
def quantized(root: Path, name: str, kind: str) -> tuple[Path, Tensors]:
    target = root / f"{name}-{kind}"
    return target, quantize_folder(write(by_name(name), root), target, kind, **(GPTQ if kind == "gptq" else {}))


@pytest.mark.parametrize("kind", ["exl2", "gptq"])
@pytest.mark.parametrize("name", ["phi3", "qwen2", "mixtral", "gemma2"])
def test_quantized_folders_are_dequantized_exactly(name: str, kind: str, root: Path) -> None:
    folder, dense = quantized(root, name, kind)
    config = json.loads((folder / "config.json").read_text())
    with Source.open(folder) as source:
        expect(source, split_fused(dense, config))
        assert source.formats == ({kind} if kind == "exl2" and name != "gemma2" else {kind, "dense"})


def test_stacked_experts(root: Path, tmp_path: Path) -> None:
    single = write(by_name("qwen3_moe"), root)

    def stack(tensors: Tensors) -> None:
        for i in (0, 2):
            stem = f"model.layers.{i}.mlp.experts"
            parts = {
                part: [tensors.pop(f"{stem}.{e}.{part}.weight") for e in range(6)]
                for part in ("gate_proj", "up_proj", "down_proj")
            }
            pairs = zip(parts["gate_proj"], parts["up_proj"], strict=True)
            tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            tensors[f"{stem}.down_proj"] = torch.stack(parts["down_proj"])

    with Source.open(edited(single, tmp_path / "stacked", stack)) as source:
        expect(source, state_of(single))
        assert source.formats == {"dense"}


def test_slots_stand_in_the_order_of_the_computation(root: Path) -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    gated = ["gate_proj", "up_proj", "down_proj"]
    with Source.open(write(by_name("qwen3_moe"), root)) as source:
        assert [slot.key for slot in source.slots(1)] == [*attention, *gated]
        experts = [f"experts.{e}.{part}" for e in range(6) for part in gated]
        assert [slot.key for slot in source.slots(2)] == [*attention, *experts]
        assert source.slots(2)[5].path == "model.layers.2.mlp.experts.0.up_proj"
        assert isinstance(source.spec.layers[2].mlp, MoeSpec)
        assert source.dense_tensors(2)["model.layers.2.mlp.gate.weight"] == "router"
        assert source.parameters == sum(source.matrix(slot).numel() for slot in all_slots(source))
        assert source.head_parameters == 64 * 131


def test_a_language_model_inside_a_vision_model(root: Path, tmp_path: Path) -> None:
    text = write(by_name("gemma3"), root)
    extras = {"vision_tower.vision_model.post_layernorm.weight": torch.ones(8), "multi_modal_projector.w": torch.eye(3)}

    def wrap(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors |= extras
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(8)

    folder = edited(text, tmp_path / "m", wrap)
    inner = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}, "text_config": inner}
    (folder / "config.json").write_text(json.dumps(outer))
    with Source.open(folder) as source, Source.open(text) as plain:
        assert source.extra_tensors() == tuple(sorted(extras))
        assert torch.equal(source.extra("multi_modal_projector.w"), torch.eye(3))
        assert source.slots(0)[0].path == "language_model.model.layers.0.self_attn.q_proj"
        assert "language_model.model.norm.weight" in source.dense_tensors(None)
        assert all(torch.equal(tensor, plain.layer(3)[key]) for key, tensor in source.layer(3).items())


def test_what_a_gptq_folder_leaves_over_is_not_extra(root: Path, tmp_path: Path) -> None:
    def leftovers(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".qweight")]:
            tensors[name.replace("qweight", "bias")] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
            tensors[name.replace("qweight", "wf")] = torch.arange(0, 32, 4, dtype=torch.int32)[None]

    folder, _ = quantized(root, "gemma2", "gptq")
    with Source.open(edited(folder, tmp_path / "m", leftovers)) as source:
        assert source.extra_tensors() == ()
        assert not any(key.endswith(".bias") for key in source.layer(0))


def test_a_bias_of_zeros_where_the_architecture_has_one(root: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.bias"

    def zero(tensors: Tensors) -> None:
        tensors[name].zero_()

    with Source.open(edited(write(by_name("qwen2"), root), tmp_path / "m", zero)) as source:
        assert torch.equal(source.layer(1)["k_proj.bias"], torch.zeros(32))


@pytest.mark.parametrize("kind", ["dense", "exl2", "gptq"])
def test_a_padded_vocabulary(kind: str, root: Path, tmp_path: Path) -> None:
    folder = write(by_name("llama"), root) if kind == "dense" else quantized(root, "llama", kind)[0]
    shutil.copytree(folder, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", vocab_size=100)
    with Source.open(tmp_path / "m") as source, Source.open(folder) as whole:
        assert source.embedding().shape == (131, 64)
        assert source.embedding_rows == 131
        assert source.head_slot.outputs == 100
        assert torch.equal(source.head(), whole.head()[:, :100])


def test_a_padded_vocabulary_whose_table_is_the_head(root: Path, tmp_path: Path) -> None:
    folder = write(by_name("gemma2"), root)
    shutil.copytree(folder, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", vocab_size=100)
    with Source.open(tmp_path / "m") as source:
        assert source.head_is_embedding
        assert torch.equal(source.head(), source.embedding()[:100].t())


def test_a_part_of_a_fused_bias_that_should_not_be_there_is_named(root: Path, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        for i, value in ((0, 0.5), (1, 0.0)):
            tensors[f"model.layers.{i}.self_attn.qkv_proj.bias"] = torch.zeros(128)
            tensors[f"model.layers.{i}.self_attn.qkv_proj.bias"][96:] = value  # the part of v_proj

    with Source.open(edited(write(by_name("phi3"), root), tmp_path / "m", add)) as source:
        with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.qkv_proj\.bias.* a bias"):
            source.layer(0)
        assert "v_proj.bias" not in source.layer(1)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.layers.1.self_attn.v_proj.weight", lambda source: source.layer(1)),
        ("model.layers.1.self_attn.v_proj.bias", lambda source: source.layer(1)),
        ("model.layers.1.post_attention_layernorm.weight", lambda source: source.layer(1)),
        ("model.embed_tokens.weight", lambda source: source.embedding()),
        ("model.norm.weight", lambda source: source.final_norm()),
        ("lm_head.weight", lambda source: source.head()),
    ],
)
def test_weights_that_are_not_finite_are_named(name: str, read, root: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[name].view(-1)[7] = float("inf")

    with Source.open(edited(write(by_name("qwen2"), root), tmp_path / "m", spoil)) as source:
        with pytest.raises(NonFiniteError) as caught:
            read(source)
        assert name.removesuffix(".weight").removesuffix(".bias") in caught.value.problem
        assert "model.safetensors" in caught.value.problem


def test_tensors_that_are_missing_or_do_not_fit_are_named(root: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
        tensors["model.layers.2.mlp.up_proj.bias"] = torch.ones(96)

    with Source.open(edited(write(by_name("mistral"), root), tmp_path / "m", spoil)) as source:
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj"):
            source.layer(0)
        with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj .*\(95, 64\)"):
            source.layer(1)
        with pytest.raises(FormatError, match=r"layers\.2\.mlp\.up_proj\.bias.* a bias"):
            source.layer(2)
    with pytest.raises(CheckpointError, match="closed"):
        source.layer(1)
