"""The measuring stage: what it reads and writes, where it goes on, and that it does not depend on how it is cut."""

from pathlib import Path

import pytest
import torch
from converting import Quiet, in_a_hurry, options, small_model

from convert import measuring, workspace
from convert.forward import LayerForward, embed, logits
from convert.measuring import load, measure, measuring_rows
from convert.source import Source
from convert.states import States
from convert.workspace import Workspace, open_workspace
from exl_runtime.checkpoint.writer import read_tensor
from exl_runtime.errors import ConvertError, NonFiniteError
from exl_runtime.files import read_json, write_json

ROWS = torch.randint(3, 70, (8, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with in_a_hurry():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    with Source.open(small_model("llama", tmp_path_factory.mktemp("models"))) as opened:
        yield opened


def space_for(source: Source, folder: Path, memory: int = 1 << 30):
    return open_workspace(folder, options(source.folder, folder.parent / "out"), source.identity(), memory)


def measured(source: Source, space: Workspace, encoder: str = "best", chunk: int = 3) -> measuring.Measured:
    return measure(
        source,
        space,
        ROWS,
        encoder=encoder,
        chunk=chunk,
        seed=0,
        protocol="how",
        dataset="what",
        progress=Quiet(),
    )


def test_rows_are_an_even_choice() -> None:
    rows = torch.arange(100)[:, None].expand(100, 512)
    assert measuring_rows(rows)[:, 0].tolist() == list(range(0, 96, 6))
    assert measuring_rows(rows[:5]).shape == (5, 512)
    assert measuring_rows(torch.zeros(100, 8192)).shape == (8, 8192)


def test_the_gradient_at_the_top_is_that_of_drawn_tokens(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every token: the gradient of the log-probability of one token of the vocabulary, however it is cut."""
    spec, states = source.spec, last_states(source)
    x = states.read(0, states.rows).requires_grad_(True)
    scores = torch.log_softmax(logits(spec, x, source.final_norm(), source.head()), -1)
    # Summed over tokens at once: a token's scores do not depend on another token's state here.
    each = [torch.autograd.grad(scores[..., v].sum(), x, retain_graph=True)[0] for v in range(spec.vocab_size)]
    for tokens in (100, 5):
        monkeypatch.setattr(measuring, "CHUNK_FLOATS", tokens * spec.vocab_size)
        found = measuring.top_gradients(source, states, 0)
        off = torch.stack([(found - wanted).abs().amax(-1) for wanted in each])
        assert float(off.amin(0).max()) < 1e-5
        assert len(off.argmin(0).unique()) > 20
        assert torch.equal(found, measuring.top_gradients(source, states, 0))
        assert not torch.equal(found, measuring.top_gradients(source, states, 1))


def last_states(source: Source) -> States:
    states = States((8, 16, source.spec.hidden_size))
    states.write(0, embed(source.spec, source.embedding(), ROWS))
    for layer in source.spec.layers:
        forward = LayerForward(source.spec, layer, 16, source.device)
        states.write(0, forward(states.read(0, 8), source.layer(layer.index)))
    return states


@pytest.mark.parametrize("encoder", ["best", "classic"])
def test_the_file_says_what_was_measured_on_what(encoder: str, source: Source, tmp_path: Path) -> None:
    with space_for(source, tmp_path / "w") as space:
        found = measured(source, space, encoder)
        record = read_json(space.measurement)
        assert load(space.measurement, source, encoder) == found
    assert record["model"] == source.identity() and record["encoder"] == encoder
    assert record["calibration"] == {"dataset": "what", "protocol": "how", "rows": 8, "length": 16}
    if encoder == "best":
        assert [item.path for item in found] == [slot.path for i in (0, 1) for slot in source.slots(i)]
        assert all(sum(item.losses[2, 64]) > sum(item.losses[4, 32]) > sum(item.losses[8, 128]) for item in found)
    else:
        assert [half.name for half in found] == ["0.attention", "0.mlp", "1.attention", "1.mlp"]


def test_where_it_goes_on(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is missing is measured; hidden states in memory or on the disk."""
    with space_for(source, tmp_path / "a") as space:
        whole = measured(source, space)
        assert not list((tmp_path / "a" / "scratch").iterdir())
    monkeypatch.setattr(workspace, "MEMORY_SHARE", 0)
    with space_for(source, tmp_path / "b") as space:
        write_json(space.measured(1), read_json(tmp_path / "a" / "measure" / "layer-0001.json"))
        assert measured(source, space) == whole  # without the gradient below it, layer 1 is measured again
        space.measured(0).unlink()
        assert not space.gradient(1).exists()
        gradient = read_tensor(space.gradient(0), "g")
        assert gradient.shape == (8, 16, 32)
        assert measured(source, space) == whole
        assert not list((tmp_path / "b" / "scratch").iterdir())


def test_layers_that_say_nothing_finite_are_named(source: Source, tmp_path: Path, monkeypatch) -> None:
    real = Source.layer

    def wild(self: Source, i: int) -> dict[str, torch.Tensor]:
        held = real(self, i)
        if i == 1:
            held["down_proj"] = held["down_proj"] * 3e38
        return held

    monkeypatch.setattr(Source, "layer", wild)
    with space_for(source, tmp_path / "w") as space, pytest.raises(NonFiniteError, match="an output of layer 1"):
        measured(source, space)


def test_files_that_are_refused(source: Source, tmp_path: Path) -> None:
    with space_for(source, tmp_path / "w") as space:
        measured(source, space, "classic")
        good = read_json(space.measurement)
    path = tmp_path / "m.json"
    for words, changes in (
        ("not a measurement", {"format": "x"}),
        ("another version", {"version": 2}),
        ("another model", {"model": "0"}),
        ("measured for --encoder best", {"encoder": "best"}),
        ("damaged", {"entries": None}),
        ("does not fit the model", {"entries": {}}),
        ("does not fit the model", {"entries": {k: v for k, v in good["entries"].items() if k != "1.mlp"}}),
        ("does not fit the model", {"entries": {**good["entries"], "2.mlp": good["entries"]["1.mlp"]}}),
    ):
        write_json(path, {**good, **changes})
        with pytest.raises(ConvertError, match=words) as caught:
            load(path, source, "classic")
        assert str(path) in caught.value.problem and caught.value.hint
