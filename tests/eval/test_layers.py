"""Errors of matrices: against numpy in float64 on the files themselves, and against what the formats say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from eval import layers
from eval.layers import count_layers, layer_errors, mean_bits
from exl_runtime.errors import CheckpointError, EvalError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def shaken(source: Path, target: Path) -> dict[str, float]:
    """A copy of `source` with noise on every matrix, a different amount on each; tensor -> relative error, float64."""
    shutil.copytree(source, target)
    rng = np.random.default_rng(5)
    path = target / "model.safetensors"
    tensors, errors = load_file(path), {}
    for index, (name, value) in enumerate(sorted(tensors.items())):
        if value.ndim < 2:
            continue
        noisy = (value + rng.normal(size=value.shape) * 0.01 * (index + 1)).astype(np.float32)
        if index % 7 == 3:
            noisy = value.copy()
        errors[name] = np.linalg.norm((noisy.astype(np.float64) - value).ravel()) / np.linalg.norm(
            value.astype(np.float64).ravel()
        )
        tensors[name] = noisy
    save_file(tensors, path, metadata={"format": "pt"})
    return errors


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # the second with heads that are wider than the hidden state
def test_every_matrix_against_numpy(root: Path, tmp_path: Path, family: str) -> None:
    source = tiny.write(tiny.by_name(family), root)
    wanted = shaken(source, tmp_path / "noisy")
    seen: list[int] = []
    found = layer_errors(source, tmp_path / "noisy", seen.append)
    assert seen == [0, 1, 2] == list(range(count_layers(source)))
    assert len(found) == 3 * 7 + 1
    for entry in found:
        room = "self_attn" if entry.kind in layers.ATTENTION else "mlp"
        name = f"model.layers.{entry.layer}.{room}.{entry.kind}" if entry.layer is not None else "lm_head"
        assert entry.error == pytest.approx(wanted[f"{name}.weight"], rel=1e-6)
        assert entry.bits == 32.0
    assert any(entry.error == 0.0 for entry in found)
    assert found[-1].layer is None


def test_fused_matrices_and_a_tied_head(root: Path, tmp_path: Path) -> None:
    source = tiny.write(tiny.by_name("phi3"), root)
    shaken(source, tmp_path / "noisy")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "noisy"))
    queries = slice(0, 64), slice(64, 96), slice(96, 128)  # 4 heads, 2 and 2 key/value heads of 16
    found = {(entry.layer, entry.kind): entry.error for entry in layer_errors(source, tmp_path / "noisy")}
    for kind, rows in zip(("q_proj", "k_proj", "v_proj"), queries, strict=True):
        a, b = (t["model.layers.1.self_attn.qkv_proj.weight"][rows].astype(np.float64) for t in (before, after))
        assert found[1, kind] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-6)

    tied = tiny.write(tiny.by_name("llama_bias"), root)
    wanted = shaken(tied, tmp_path / "tied")
    assert "lm_head.weight" not in wanted
    assert layer_errors(tied, tmp_path / "tied")[-1].error == pytest.approx(
        wanted["model.embed_tokens.weight"], rel=1e-6
    )


def test_experts_count_together(root: Path, tmp_path: Path) -> None:
    source = tiny.write(tiny.by_name("mixtral"), root)
    shaken(source, tmp_path / "noisy")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "noisy"))
    found = {(entry.layer, entry.kind): entry.error for entry in layer_errors(source, tmp_path / "noisy")}
    assert {kind for layer, kind in found if layer == 0} == {*layers.ATTENTION, *layers.MLP, "gate"}
    names = [f"model.layers.2.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)]
    a, b = (np.concatenate([t[name].astype(np.float64).ravel() for name in names]) for t in (before, after))
    assert found[2, "down_proj"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-6)


def test_a_model_is_at_no_distance_from_itself(demo: Path) -> None:
    assert {entry.error for entry in layer_errors(demo, demo)} == {0.0}


def test_quantized_against_its_source(demo: Path, ember: Path) -> None:
    """Errors are small and of the size that the bits suggest; the bits are those of `exl info`."""
    from exl_runtime.model.summary import summarize

    found = layer_errors(ember, demo)
    assert all(0.005 < entry.error < 0.2 for entry in found)
    kinds = {kind.kind: kind for kind in summarize(demo).kinds}
    assert mean_bits(found, "lm_head") == pytest.approx(kinds["head"].bits_per_weight)
    attention = sum(entry.bits * size for entry, size in sized(found, demo) if entry.kind in layers.ATTENTION)
    assert attention == pytest.approx(kinds["attention"].bits_per_weight * kinds["attention"].weights)
    assert mean_bits(found, "gate") is None


def sized(found: tuple[layers.MatrixError, ...], folder: Path) -> list[tuple[layers.MatrixError, int]]:
    config = json.loads((folder / "config.json").read_text())
    hidden, heads, narrow = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    width = config["head_dim"]
    sizes = {"q_proj": heads, "o_proj": heads, "k_proj": narrow, "v_proj": narrow}
    return [(entry, hidden * width * sizes.get(entry.kind, 0)) for entry in found]


def test_blocks_change_nothing(demo: Path, ember: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layer_errors(ember, demo)
    monkeypatch.setattr(layers, "BLOCK", 256 * 96)
    parts = layer_errors(ember, demo)
    assert [entry.error for entry in parts] == pytest.approx([entry.error for entry in whole], rel=1e-9)
    assert [entry.bits for entry in parts] == [entry.bits for entry in whole]


def test_another_model_is_refused_in_one_line(root: Path, ember: Path) -> None:
    source = tiny.write(tiny.by_name("llama"), root)
    with pytest.raises(EvalError, match=r"another model than .* hidden size 256 instead of 64") as caught:
        layer_errors(source, ember)
    assert "\n" not in caught.value.problem


def test_a_missing_matrix_is_named(root: Path, tmp_path: Path) -> None:
    source = tiny.write(tiny.by_name("llama"), root)
    shutil.copytree(source, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        layer_errors(source, tmp_path / "broken")
