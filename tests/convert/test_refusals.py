"""Conversions that cannot be: refused in one line before any work, with nothing left behind and nothing lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import edit_json
from converting import convert, in_a_hurry, interrupt, options, refused, small_model, tensors
from safetensors.torch import save_file

from convert import finish, job
from convert.source import Source
from convert.workspace import open_workspace
from exl_runtime.errors import ConfigError, NonFiniteError, OutOfMemory, UnsupportedModel


@pytest.fixture(scope="module", autouse=True)
def quick():
    with in_a_hurry():
        yield


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    stored = tensors(folder)
    change(stored)
    save_file(stored, folder / "model.safetensors")


def refuse(source: Path, words: str, **changes: Any) -> Exception:
    """The job is refused in these words, and leaves nothing behind."""
    before = sorted(source.parent.rglob("*"))
    error = refused(options(source, source.parent / "out", **changes))
    assert words in error.problem, error.problem
    assert sorted(source.parent.rglob("*")) == before
    return error


# --- the model -------------------------------------------------------------------------------------------------------


def test_folders_that_are_no_model(source: Path) -> None:
    (source / "config.json").unlink()
    assert isinstance(refuse(source, "config.json"), ConfigError)
    shutil.rmtree(source)
    refuse(source, str(source))


def test_an_architecture_nobody_knows(source: Path) -> None:
    edit_json(source / "config.json", architectures=["ElizaForCausalLM"])
    assert isinstance(refuse(source, "ElizaForCausalLM"), UnsupportedModel)


def test_inputs_that_the_format_cannot_hold(source: Path) -> None:
    edit_json(source / "config.json", intermediate_size=80)
    refuse(source, "mlp.down_proj: 80 input features, EXL2 needs a multiple of 32")


BAD = {
    "model.layers.1.mlp.down_proj.weight": float("nan"),
    "model.layers.1.self_attn.k_proj.weight": -1e5,
    "model.layers.0.input_layernorm.weight": 7e4,
    "model.embed_tokens.weight": float("inf"),
    "model.norm.weight": float("-inf"),
    "lm_head.weight": 1e6,
    "vision.weight": 1e30,
}


@pytest.mark.parametrize("name", BAD)
def test_weights_that_half_precision_cannot_hold_are_named_before_any_work(name: str, source: Path) -> None:
    def spoil(stored: dict[str, torch.Tensor]) -> None:
        stored.setdefault("vision.weight", torch.ones(4, 4))
        stored[name].view(-1)[7] = BAD[name]

    edit(source, spoil)
    assert isinstance(refuse(source, name.removesuffix(".weight")), NonFiniteError)


def test_weights_that_overflow_on_the_way(source: Path) -> None:
    """Every value is a half, and yet the layer's outputs are not even floats."""

    def spoil(stored: dict[str, torch.Tensor]) -> None:
        for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"):
            for layer in (0, 1):
                stored[f"model.layers.{layer}.{name}.weight"].fill_(6e4)
        for name in ("input_layernorm", "post_attention_layernorm"):
            stored[f"model.layers.0.{name}.weight"].fill_(6e4)

    edit(source, spoil)
    (source.parent / "text.txt").write_text("abc" * 3000)
    error = refused(options(source, source.parent / "out", calibration=(source.parent / "text.txt",)))
    assert isinstance(error, NonFiniteError) and "layer" in error.problem


def test_more_memory_than_there_is(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "free_memory", lambda device: 10 << 20)
    assert isinstance(refuse(source, "of memory"), OutOfMemory)


# --- calibration and measurement -------------------------------------------------------------------------------------


def test_calibration_that_cannot_be(source: Path) -> None:
    text = source.parent / "text.txt"
    refuse(source, f"{text}: no such file", calibration=(text,))
    text.write_text("too short")
    refuse(source, "too little calibration text", calibration=(text,))
    refuse(source, "the model ends at 512 tokens", length=513)


def test_tokenizers_that_are_not_the_models(source: Path) -> None:
    text = source.parent / "text.txt"
    text.write_text("".join(map(chr, range(33, 120))) * 100)
    edit_json(source / "config.json", vocab_size=40)
    edit(source, lambda stored: stored.update({"lm_head.weight": stored["lm_head.weight"][:40].clone()}))
    refuse(source, "the model has 40", calibration=(text,))
    (source / "tokenizer.json").unlink()
    refuse(source, "no usable tokenizer")


def test_a_tokenizer_of_which_no_opening_fits(source: Path) -> None:
    edit_json(source / "config.json", vocab_size=10, bos_token_id=None)
    (source / "generation_config.json").unlink()
    edit(source, lambda stored: stored.update({"lm_head.weight": stored["lm_head.weight"][:10].clone()}))
    refuse(source, "its tokenizer gives ids that the model does not have")


def test_measurements_that_do_not_fit(source: Path, models: Path, tmp_path: Path) -> None:
    measured = convert(options(small_model("llama", models), None, bits=None, measure_only=True, work=tmp_path / "w"))
    good = json.loads(measured.measurement.read_text())
    name = "model.layers.1.mlp.up_proj"
    path = tmp_path / "m.json"

    def spoiled(**changes: Any) -> None:
        path.write_text(json.dumps({**good, **changes}))

    refuse(source, "no such file", measurement=path)
    path.write_text("{")
    refuse(source, str(path), measurement=path)
    path.write_text(json.dumps({"measurement": {}, "last_module_idx": 3}))
    refuse(source, "exllamav2's", measurement=path)
    path.write_text(json.dumps({"a": 1}))
    refuse(source, "not a measurement of this program", measurement=path)
    spoiled(version=0)
    refuse(source, "another version", measurement=path)
    spoiled(encoder="classic")
    refuse(source, "measured for --encoder classic, not for best", measurement=path)
    spoiled(entries=[])
    refuse(source, "damaged", measurement=path)
    spoiled(entries={key: value for key, value in good["entries"].items() if key != name})
    refuse(source, name, measurement=path)
    spoiled(entries={**good["entries"], name: {**good["entries"][name], "outputs": 96}})
    refuse(source, name, measurement=path)
    spoiled(entries={**good["entries"], name: {**good["entries"][name], "losses": {}}})
    refuse(source, name, measurement=path)
    # Another model: the same shapes and norms, one matrix slightly different, as after merging an adapter.
    spoiled()
    edit(source, lambda stored: stored[f"{name}.weight"].mul_(1.01))
    refuse(source, "of another model", measurement=path)


@pytest.mark.parametrize("encoder", ["best", "classic"])
def test_bits_that_cannot_be_reached(encoder: str, source: Path) -> None:
    lowest, highest = ("3.273" if encoder == "best" else "4.736"), "9.939"
    for bits in (2.0, 12.0):
        error = refuse(source, f"{bits:g} bits per weight cannot be reached", bits=bits, encoder=encoder)
        assert lowest in error.problem and highest in error.problem and error.hint


# --- places ----------------------------------------------------------------------------------------------------------


def test_results_that_have_no_place(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = source.parent / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("1")
    refuse(source, "exists and is not empty (it holds thesis.txt)")
    shutil.rmtree(out)
    (source.parent / "out.partial").mkdir()
    (source.parent / "out.partial" / "model.safetensors").write_text("1")
    refuse(source, "it holds model.safetensors")
    shutil.rmtree(source.parent / "out.partial")
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if "out.partial" in str(path) and flags & os.O_CREAT:
            raise OSError(30, os.strerror(30))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    refuse(source, "out.partial/probe: cannot be written: the disk is read-only")


def test_a_work_folder_that_is_something_else(source: Path) -> None:
    work = source.parent / "out.work"
    work.mkdir()
    (work / "thesis.txt").write_text("1")
    refuse(source, "no work folder of a conversion (it holds thesis.txt)")


def begun(source: Path) -> Path:
    """A job that was interrupted behind its calibration; returns its work folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.measuring, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(options(source, source.parent / "out"))
    return source.parent / "out.work"


def test_changed_options_and_changed_models_are_refused(source: Path) -> None:
    begun(source)
    refuse(source, "bits: 5.5 when the job started, 6.0 now; seed: 0 when the job started, 3 now", bits=6.0, seed=3)
    refuse(source, "encoder: best when the job started, classic now", encoder="classic")
    before = (source / "model.safetensors").read_bytes()
    edit(source, lambda stored: stored["model.layers.1.mlp.up_proj.weight"].mul_(1.01))
    refuse(source, "is not the one the job was started with")
    (source / "model.safetensors").write_bytes(before)
    convert(options(source, source.parent / "out", threads=1))  # what changes no result may differ


def test_damaged_and_foreign_jobs(source: Path) -> None:
    path = begun(source) / "job.json"
    edit_json(path, version=0)
    refuse(source, "another version")
    path.write_text("{")
    assert "another --work" in refuse(source, "job.json").hint
    path.write_text("{}")
    refuse(source, "job.json")


def test_two_processes_on_one_job(source: Path) -> None:
    mine = options(source, source.parent / "out")
    with Source.open(source) as opened:
        with open_workspace(source.parent / "out.work", mine, opened.identity(), 1 << 30):
            refuse(source, "another process is working on this job")
        with finish.open_target(source.parent / "out", source):
            refuse(source, "another process is working on this job", work=source.parent / "elsewhere")
    convert(mine)
