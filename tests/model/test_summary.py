"""`summarize` against the files and against what a loaded model takes."""

import pytest
from breaking import drop_tensor
from quantize import quantize_folder

from exl_runtime import load
from exl_runtime.errors import CheckpointError
from exl_runtime.model.summary import summarize


def test_the_demo(demo) -> None:
    summary = summarize(demo)
    kinds = {kind.kind: kind for kind in summary.kinds}
    assert summary.format == "exl2" and kinds["embedding"].formats == ("dense",)
    assert (kinds["attention"].matrices, kinds["mlp"].matrices, kinds["head"].matrices) == (24, 18, 1)
    assert summary.parameters == 2 * 2048 * 256 + 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)
    # Everything but norms and headers is a matrix: the bits must add up to the files.
    assert 0 <= summary.file_bytes - summary.weight_bytes < 40_000
    inside = [kinds["attention"], kinds["mlp"]]
    bits = sum(kind.bits_per_weight * kind.weights for kind in inside) / sum(kind.weights for kind in inside)
    assert summary.bits_per_weight == pytest.approx(bits)
    assert summary.total_bytes == summary.weight_bytes + summary.cache_bytes + summary.working_bytes


def test_memory_of_the_loaded_model(demo, ember) -> None:
    for folder in (demo, ember):
        summary = summarize(folder)
        with load(folder) as runtime:
            if runtime.info.backend != "cpu":
                pytest.skip("the reference path holds weights unpacked")
            assert runtime.info.weight_bytes == pytest.approx(summary.weight_bytes, rel=0.1)


def test_cache_memory_follows_the_context(demo) -> None:
    one, two = summarize(demo, 256), summarize(demo, 1024)
    # 6 layers, keys and values, 4 heads of 32 floats; whole pages, and one for a copy
    assert one.cache_bytes == 2 * 256 * 6 * 2 * 4 * 32 * 4
    assert two.cache_bytes == 5 * 256 * 6 * 2 * 4 * 32 * 4
    assert summarize(demo, 1024, cache="fp16").cache_bytes * 2 == two.cache_bytes


def test_gptq_and_damage(ember, tmp_path) -> None:
    folder = tmp_path / "gptq"
    quantize_folder(ember, folder, "gptq", bits=4, group_size=128, act_order=False, symmetric=True, version=1)
    summary = summarize(folder)
    kinds = {kind.kind: kind for kind in summary.kinds}
    assert summary.format == "gptq" and kinds["head"].formats == ("dense",)
    assert 4.1 < kinds["mlp"].bits_per_weight < 4.4
    drop_tensor(folder, "embed_tokens.weight")
    with pytest.raises(CheckpointError, match="embed_tokens"):
        summarize(folder)
