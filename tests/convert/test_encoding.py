"""The encoding stage: its files, its two streams, and where it goes on."""

import shutil
from pathlib import Path

import pytest
import torch
from converting import Quiet, in_a_hurry, interrupt, options, small_model, tensors
from safetensors.torch import load_file, save_file

from convert.allocate import uniform
from convert.encoding import Job, encode_layers, load_layer, reports
from convert.forward import LayerForward, embed
from convert.layouts import head_option
from convert.source import Source
from convert.workspace import Workspace, open_workspace
from exl_runtime.errors import NonFiniteError
from exl_runtime.formats import Exl2, LinearShape

ROWS = torch.randint(3, 70, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with in_a_hurry():
        yield


def space_for(source: Source, folder: Path):
    return open_workspace(folder, options(source.folder, folder.parent / "out"), source.identity(), 1 << 30)


def encoded(source: Source, space: Workspace, encoder: str = "best", bits: int = 4, chunk: int = 4) -> None:
    slots = [slot for layer in source.spec.layers for slot in source.slots(layer.index)]
    layouts = {slot.path: uniform(slot.inputs, bits, 32) for slot in slots}
    layouts[source.head_slot.path] = head_option(6).layout(source.spec.hidden_size)
    encode_layers(
        Job(source=source, space=space, rows=ROWS, layouts=layouts, encoder=encoder, chunk=chunk, progress=Quiet())
    )


@pytest.mark.parametrize("encoder", ["best", "classic"])
@pytest.mark.parametrize("name", ["llama_bias", "mixtral"])
def test_files_of_layers(name: str, encoder: str, models: Path, tmp_path: Path) -> None:
    with Source.open(small_model(name, models)) as source, space_for(source, tmp_path / "w") as space:
        encoded(source, space, encoder)
        found = reports(source, space)
        every = [slot for i in (0, 1) for slot in source.slots(i)] + [source.head_slot]
        assert [entry.path for entry in found] == [slot.path for slot in every]
        assert not list((tmp_path / "w" / "states").iterdir()) and not list((tmp_path / "w" / "scratch").iterdir())
        for layer in (0, 1, None):
            stored = load_file(space.layer(layer))
            slots = {slot.key: slot for slot in source.layer_slots(layer)}
            read, _ = load_layer(source, space, layer)
            for key, slot in slots.items():
                group = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith(f"{slot.path}.")}
                bias = group.pop("bias", None)
                weight = Exl2.load(group, LinearShape(slot.inputs, slot.outputs), where=key).dequantize()
                assert torch.equal(weight, read[slot.path].weight())
                wanted = source.matrix(slot)
                assert float((weight - wanted).norm() / wanted.norm()) < 0.3
                if slot.biased:
                    assert torch.equal(bias[: slot.outputs], source.layer(layer)[f"{key}.bias"].half())
                (entry,) = [entry for entry in found if entry.path == slot.path]
                nbytes = sum(t.nbytes for t in group.values()) + (0 if bias is None else bias.nbytes)
                assert entry.bits_per_weight == 8 * nbytes / weight.numel() and entry.weights == weight.numel()
                assert 0 < entry.error < 0.3
            for dense, key in source.dense_tensors(layer).items():
                if key == "embedding":
                    assert dense not in stored
                    continue
                value = source.final_norm() if layer is None else source.layer(layer)[key]
                assert torch.equal(stored[dense], (value.t() if value.dim() == 2 else value).half())


def test_the_two_streams_are_what_the_two_models_compute(models: Path, tmp_path: Path) -> None:
    """The source's stream is the source's forward pass; the result's that of what is stored, embedding in half."""
    with Source.open(small_model("llama", models)) as source, space_for(source, tmp_path / "w") as space:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("convert.encoding._head", interrupt)
            with pytest.raises(KeyboardInterrupt):
                encoded(source, space)
        x = embed(source.spec, source.embedding(), ROWS)
        y = embed(source.spec, source.embedding().half().float(), ROWS)
        for layer in source.spec.layers:
            forward, w = LayerForward(source.spec, layer, 16, source.device), source.layer(layer.index)
            x = forward(x, w)
            slots = {slot.key: slot for slot in source.slots(layer.index)}
            read, _ = load_layer(source, space, layer.index)
            w = {key: tensor.half().float() for key, tensor in w.items()}
            y = forward(y, w | {key: read[slot.path].weight() for key, slot in slots.items()})
        for stream, wanted in (("source", x), ("result", y)):
            stored = torch.frombuffer(bytearray(space.states(2, stream).read_bytes()), dtype=torch.float32).view(
                x.shape
            )
            assert torch.allclose(stored, wanted, atol=1e-5)
        assert not space.states(1, "source").exists()


def test_layers_without_the_states_before_them_are_encoded_again(models: Path, tmp_path: Path) -> None:
    with Source.open(small_model("llama", models)) as source:
        with space_for(source, tmp_path / "a") as space:
            encoded(source, space)
            whole = [space.layer(i).read_bytes() for i in (0, 1, None)]
        with space_for(source, tmp_path / "b") as space:
            encoded(source, space)
            space.layer(0).unlink()
            space.notes(1).unlink()
            (tmp_path / "b" / "states" / "source-0001.f32").write_bytes(b"")  # its companion is missing
            encoded(source, space)
            assert [space.layer(i).read_bytes() for i in (0, 1, None)] == whole
            assert not list((tmp_path / "b" / "states").iterdir())
            times = [space.layer(i).stat().st_mtime_ns for i in (0, 1, None)]
            encoded(source, space)  # nothing to do
            assert [space.layer(i).stat().st_mtime_ns for i in (0, 1, None)] == times


def test_dense_values_that_do_not_fit_are_named(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_model("llama", models), tmp_path / "m")
    stored = tensors(folder)
    stored["model.layers.1.input_layernorm.weight"][3] = 7e4
    save_file(stored, folder / "model.safetensors")
    with (
        Source.open(folder) as source,
        space_for(source, tmp_path / "w") as space,
        pytest.raises(NonFiniteError, match=r"layers\.1\.input_layernorm"),
    ):
        encoded(source, space)
