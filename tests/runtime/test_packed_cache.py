"""Loading from the packed cache: the same model to the last bit, made anew whenever the files are not the same."""

import importlib
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import unavailable
from driving import run
from oracles import same_bits
from quantize import quantize_folder
from tiny import by_name, write

import exl_runtime as exl
from exl_runtime.checkpoint import packed
from exl_runtime.checkpoint.packed import NOT_KEPT, PackedCache
from exl_runtime.checkpoint.reader import Checkpoint
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.model.loader import load_transformer
from exl_runtime.model.transformer import Transformer
from exl_runtime.ops import native
from exl_runtime.ops.linear.stored_cpu import StoredCpu
from exl_runtime.runtime.packed import packed_cache, packed_folder

ORDERED = {"bits": 4, "group_size": 32, "act_order": True, "symmetric": False, "version": 2}
IDS = list(range(5, 45))
load_module = importlib.import_module("exl_runtime.runtime.load")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackedCache:
    """In a folder of its own, for models of every size."""
    if why := unavailable("cpu"):
        pytest.skip(why)
    like = packed_cache()
    made = PackedCache(tmp_path / "packed", checksum=like._checksum, layout=like._layout, least=0)
    monkeypatch.setattr(load_module, "open_packed_cache", lambda: made)
    return made


@pytest.fixture
def folder(demo: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo, tmp_path / "model")
    return tmp_path / "model"


def stored(model: Transformer) -> set[bool]:
    """Whether the kernels come out of a packed model: all of them, none, or some."""
    return {isinstance(linear.kernel, StoredCpu) for block in model.blocks for linear in (*block.linears, model.head)}


def start(folder: Path, **options: object) -> tuple[torch.Tensor, set[bool], exl.RuntimeInfo]:
    """A load: logits, what `stored` says, and the runtime's facts."""
    seen: list[Transformer] = []

    def noting(*args: object, **more: object) -> Transformer:
        seen.append(load_transformer(*args, **more))
        return seen[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "load_transformer", noting)
        with exl.load(folder, device="cpu", context=256, **options) as runtime:
            assert packed.finish()
            return runtime.logits(IDS), stored(seen[0]), runtime.info


def test_the_second_start_has_the_same_bits(cache, folder) -> None:
    plain, kinds, _ = start(folder, packed_cache=False)
    assert kinds == {False} and not cache.models()
    first, kinds, made = start(folder)
    assert kinds == {False} and len(cache.models()) == 1
    second, kinds, found = start(folder)
    assert kinds == {True}
    assert same_bits(first, plain) and same_bits(second, plain)
    assert (found.format, found.weight_bytes) == (made.format, made.weight_bytes)
    assert start(folder, packed_cache=False)[1] == {False}
    assert same_bits(start(folder, accuracy="fast")[0], start(folder, accuracy="fast", packed_cache=False)[0])


def test_a_damaged_cache_is_made_anew(cache, folder, caplog) -> None:
    first, _, _ = start(folder)
    (file,) = cache.models()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again, kinds, _ = start(folder)
    assert "packed again" in caplog.text and kinds == {False} and same_bits(again, first)
    assert start(folder)[1] == {True}


def test_other_weights_of_the_same_shape_are_read(cache, folder) -> None:
    first, _, _ = start(folder)
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x11  # among the codes of a matrix
    file.write_bytes(data)
    changed, kinds, _ = start(folder)
    assert kinds == {False} and not same_bits(changed, first)
    assert same_bits(start(folder)[0], changed) and len(cache.models()) == 1


def test_other_backends_do_without(cache, folder) -> None:
    start(folder, backend="reference")
    assert not cache.models()


@pytest.mark.parametrize(("name", "kind"), [("llama", "gptq"), ("phi3", "gptq"), ("mixtral", "exl2")])
def test_orders_and_experts_survive(cache, tmp_path, name, kind) -> None:
    quantize_folder(write(by_name(name), tmp_path), tmp_path / "q", kind, **ORDERED if kind == "gptq" else {})
    files = load_config(tmp_path / "q")
    spec = resolve(files.config, files.generation)

    def load(keep: bool) -> Transformer:
        with Checkpoint.open(tmp_path / "q") as checkpoint:
            entry = cache.open(checkpoint, files.quantization) if keep else NOT_KEPT
            model = load_transformer(
                checkpoint,
                spec,
                quantization=files.quantization,
                device=torch.device("cpu"),
                backend="cpu",
                packed=entry,
            )
        entry.keep()
        assert packed.finish()
        return model

    plain, first, second = load(False), load(True), load(True)
    assert False in stored(first) and True in stored(second)
    for model in (first, second):
        assert same_bits(run(model, IDS, [7]), run(plain, IDS, [7]))
    for ours, theirs in zip(second.blocks, first.blocks, strict=True):
        for a, b in zip(ours.linears, theirs.linears, strict=True):
            for found, made in (
                (a.kernel.input_order, b.kernel.input_order),
                (a.kernel.output_order, b.kernel.output_order),
            ):
                assert (found is None) == (made is None)
                assert found is None or torch.equal(found, made)


def test_it_lies_beside_the_built_kernels(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EXL_CACHE_DIR", str(tmp_path))
    assert packed_folder().folder == tmp_path / native.PACKED
    if unavailable("cpu") is None:
        assert packed_cache().folder == tmp_path / native.PACKED
