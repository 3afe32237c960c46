"""The last stage: what may lie where the result is written, and what is checked before it is called one."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from converting import Quiet, in_a_hurry, options, small_model, tensors
from safetensors.torch import save_file

from convert import finish
from convert.finish import open_target, plan_tensors
from convert.job import run
from convert.source import Source
from exl_runtime.checkpoint.writer import write_tensors
from exl_runtime.errors import ConvertError, NonFiniteError


@pytest.fixture(scope="module", autouse=True)
def quick():
    with in_a_hurry():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model("llama", tmp_path_factory.mktemp("models"))


def test_leftovers_of_an_earlier_run_go_and_other_files_stay(folder: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    ours = ("output.safetensors", "output-00001-of-00002.safetensors.partial", "probe", "config.json", "report.html")
    for name in (*ours, "tokenizer.json", "tokenizer_config.json.partial", "measurement.json"):
        (partial / name).write_text("1")
    with open_target(tmp_path / "out", folder) as place:
        assert place == partial and os.listdir(partial) == []
        (partial / "config.json").write_text("2")
    assert os.listdir(partial) == ["config.json"]  # whoever left it in peace names it
    (partial / "added_tokens.json").write_text("1")
    with pytest.raises(ConvertError, match=r"it holds added_tokens\.json"), open_target(tmp_path / "out", folder):
        pass
    assert sorted(os.listdir(partial)) == ["added_tokens.json", "config.json"]


def test_an_error_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    for error in (ConvertError("no"), KeyboardInterrupt(), RuntimeError()):
        with pytest.raises(type(error)), open_target(tmp_path / "out", folder) as partial:
            (partial / "output.safetensors").write_text("1")
            raise error
        assert os.listdir(tmp_path) == []


def test_one_process_at_a_time(folder: Path, tmp_path: Path) -> None:
    with open_target(tmp_path / "out", folder) as partial:
        (partial / "config.json").write_text("2")
        with pytest.raises(ConvertError, match="another process"), open_target(tmp_path / "out", folder):
            pass
        assert os.listdir(partial) == ["config.json"]


def test_a_target_that_cannot_be_leaves_no_folder(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise ConvertError("the disk is full")

    monkeypatch.setattr("convert.write.write_file", fail)
    with pytest.raises(ConvertError, match="full"), open_target(tmp_path / "out", folder):
        pass
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConvertError), open_target(tmp_path / "loop\0", folder):
        pass


def test_a_plan_reads_headers_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    extras = {"tower.a": torch.ones(3, 5), "tower.b": torch.arange(4), "tower.c": torch.full((2,), 1e9)}
    save_file(tensors(copy) | extras, copy / "model.safetensors")
    write_tensors(tmp_path / "layer.safetensors", {"x.q_weight": torch.ones(2, 32, dtype=torch.int32)})
    with Source.open(copy) as source:
        with monkeypatch.context() as patch:
            patch.setattr(Source, "extra", None)
            patch.setattr(Source, "embedding", None)
            planned = {entry.name: entry for entry in plan_tensors(source, [tmp_path / "layer.safetensors"])}
        assert list(planned) == ["model.embed_tokens.weight", "x.q_weight", "tower.a", "tower.b", "tower.c"]
        assert planned["tower.a"].dtype == torch.float16 and planned["tower.b"].dtype == torch.int64
        for name in ("tower.a", "tower.b", "x.q_weight", "model.embed_tokens.weight"):
            made = planned[name].make()
            assert (made.dtype, tuple(made.shape)) == (planned[name].dtype, planned[name].shape)
        with pytest.raises(NonFiniteError, match=r"tower\.c"):
            planned["tower.c"].make()
        # A table of the files' own, wherever it stands.
        table = torch.ones(70, 32, dtype=torch.float16)
        write_tensors(tmp_path / "head.safetensors", {"x.q_groups": table[0, :4], "model.embed_tokens.weight": table})
        first, *others = plan_tensors(source, [tmp_path / "head.safetensors"])
        assert first.name == "model.embed_tokens.weight" and torch.equal(first.make(), table)
        assert [entry.name for entry in others] == ["x.q_groups", "tower.a", "tower.b", "tower.c"]


@pytest.mark.parametrize("kind", ["lost", "foreign", "dense"])
def test_a_folder_that_is_not_as_planned_is_no_result(kind: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    real = finish.write_folder

    def meddle(target: Path, *args, **kwargs) -> list[Path]:
        files = real(target, *args, **kwargs)
        stored = tensors(target)
        if kind == "lost":
            del stored["model.norm.weight"]
        elif kind == "foreign":
            stored["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32, dtype=torch.float16)
        else:
            stored["model.norm.weight"] = stored["model.norm.weight"].float()
        save_file(stored, files[0])
        return files

    monkeypatch.setattr(finish, "write_folder", meddle)
    with pytest.raises(ConvertError, match="not what was planned"):
        run(options(folder, tmp_path / "out"), Quiet())
    assert os.listdir(tmp_path) == ["out.work"]
