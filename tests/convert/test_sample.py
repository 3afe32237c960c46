"""Sampled rows: against greedy transformers where nothing is left to chance, against its probabilities where it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantize import Tensors
from safetensors.torch import load_file, save_file
from tiny import by_name, logits_of, model_of, write

from convert import sample
from convert.forward import Model
from convert.sample import Decoder, sample_rows
from convert.source import Source
from exl_runtime.errors import ConvertError, NonFiniteError

COLD, HOT = 1e-7, 1e4
BOS, EOS = 1, 2


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sample")


def rows_of(name: str, root: Path, **options) -> torch.Tensor:
    given = {"rows": 6, "length": 40, "temperatures": [1.0], "seed": 5, "openings": [[BOS]]}
    with Source.open(write(by_name(name), root)) as source:
        return sample_rows(source, **{**given, **options})


@pytest.mark.parametrize("name", ["llama_bias", "mistral", "qwen3_moe", "gemma2", "gemma3", "phi3"])
def test_without_heat_rows_are_what_transformers_thinks_likeliest(name: str, root: Path) -> None:
    openings = [[BOS, 17, 9, 40], [BOS], [BOS, 77, 31]]
    rows = rows_of(name, root, rows=3, length=56, temperatures=[COLD], openings=openings).tolist()
    model = model_of(by_name(name))
    compared = 0
    for row, opening in zip(rows, openings, strict=True):
        assert row[: len(opening)] == opening
        # The model sees each row as it is, so the likeliest token behind every place is known at once.
        likeliest = logits_of(model, row).argmax(-1).tolist()
        for place in range(len(opening), len(row)):
            assert row[place] == likeliest[place - 1], place
            compared += 1
            if row[place] == EOS:
                break
    assert compared > 100


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3", "mixtral", "phi3_longrope"])
def test_one_token_at_a_time_computes_what_whole_rows_compute(name: str, root: Path) -> None:
    rows = torch.arange(3, 3 + 2 * 45).view(2, 45)
    with Source.open(write(by_name(name), root)) as source, torch.no_grad():
        whole = Model.load(source, 90)(rows)
        decoder = Decoder(source, 90, torch.float32)
        cache = decoder.new_cache(2)
        single = torch.stack([decoder(rows[:, i], i, cache) for i in range(45)], dim=1)
    assert (single - whole).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_tokens_come_as_often_as_they_are_likely(temperature: float, root: Path) -> None:
    count = 4000
    rows = rows_of("llama", root, rows=2 * count, length=3, temperatures=[temperature, HOT], openings=[[BOS, 50]])
    likely = (logits_of(model_of(by_name("llama")), [BOS, 50])[-1] / temperature).softmax(-1).double() * count
    assert (rows[:, :2] == torch.tensor([BOS, 50])).all()
    for drawn, wanted in ((rows[0::2, 2], likely), (rows[1::2, 2], torch.full((131,), count / 131))):
        seen = torch.bincount(drawn, minlength=131).double()
        often = wanted > 5
        degrees = int(often.sum()) - 1
        distance = ((seen - wanted).square() / wanted)[often].sum()
        assert distance < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations of chi square
        assert distance > degrees - 5 * (2 * degrees) ** 0.5


def test_a_seed_is_a_text(root: Path) -> None:
    first = rows_of("qwen3", root)
    assert first.dtype == torch.int64 and first.shape == (6, 40) and first.device.type == "cpu"
    assert torch.equal(first, rows_of("qwen3", root))
    assert not torch.equal(first, rows_of("qwen3", root, seed=6))
    assert len({tuple(row) for row in first.tolist()}) == 6


def test_how_rows_are_batched_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"rows": 7, "temperatures": [0.5, 1.0], "openings": [[BOS], [BOS, 5, 6], [BOS, 9], [BOS, 8]]}
    whole = rows_of("qwen2_window", root, **options)
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(sample, "CACHE_BYTES", 100_000)
    monkeypatch.setattr(sample, "CACHE_SHARE", 1 << 40)
    assert torch.equal(whole, rows_of("qwen2_window", root, progress=lambda *step: steps.append(step), **options))
    assert len(steps) > 39 and steps[-1] == (280, 280)
    assert steps == sorted(steps)


def after_an_end(row: list[int], first: list[int], again: list[list[int]], index: int) -> int:
    """Checks that behind every end that was drawn stands the next opening; how many there were."""
    place, ends = len(first), 0
    while place < len(row):
        if row[place] == EOS:
            index, ends = (index + 1) % len(again), ends + 1
            given = again[index]
            assert row[place + 1 : place + 1 + len(given)] == given[: len(row) - place - 1]
            place += len(given)
        place += 1
    return ends


def test_a_document_that_ends_is_followed_by_another(root: Path) -> None:
    openings = [[BOS, 5, EOS, 6], [7, 8]]
    rows = rows_of("llama", root, rows=4, length=400, temperatures=[HOT], openings=openings).tolist()
    again = [[BOS, 5, EOS, 6], [BOS, 7, 8]]
    assert all(row[: len(openings[i % 2])] == openings[i % 2] for i, row in enumerate(rows))
    assert sum(after_an_end(row, openings[i % 2], again, i % 2) for i, row in enumerate(rows)) >= 4


def test_a_model_without_a_first_token_goes_on_behind_the_last(root: Path) -> None:
    openings = [[5, 6], [9]]
    with Source.open(write(by_name("llama"), root)) as source:
        source.spec = replace(source.spec, bos_id=None)
        rows = sample_rows(source, rows=2, length=400, temperatures=[HOT], seed=3, openings=openings).tolist()
    assert sum(after_an_end(row, openings[i], openings, i) for i, row in enumerate(rows)) >= 2


def test_sixteen_bits_are_close(root: Path) -> None:
    """The same luck mostly draws the same tokens; one that differs changes all that follow."""
    options = {"rows": 64, "length": 8, "temperatures": [0.3]}
    exact, near = rows_of("gemma3", root, **options), rows_of("gemma3", root, dtype=torch.bfloat16, **options)
    assert (exact[:, 1] == near[:, 1]).float().mean() > 0.9
    assert not torch.equal(exact, near)


def test_a_model_that_does_not_fit_says_what_to_do(root: Path) -> None:
    with pytest.raises(ConvertError, match=r"takes 0\.\d GB, 0\.0 GB are free") as caught:
        rows_of("llama", root, memory=10_000)
    assert "--calibration FILE" in caught.value.hint
    assert rows_of("llama", root, memory=1 << 30).shape == (6, 40)


def test_weights_that_compute_infinity_are_refused(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for path in write(by_name("llama"), root).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors: Tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 3e38
    save_file(tensors, folder / "model.safetensors")
    with Source.open(folder) as source, pytest.raises(NonFiniteError, match="sampled"):
        sample_rows(source, rows=2, length=4, temperatures=[1.0], seed=0, openings=[[BOS]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": [1.0, 0.0]}, "greater than 0"),
        ({"openings": [[1], []]}, "at least one token"),
        ({"openings": []}, "at least one token"),
        ({"openings": [[131]]}, "token id 131"),
        ({"rows": 0}, "0 rows"),
    ],
)
def test_arguments_without_sense_are_refused(options, message: str, root: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of("llama", root, **options)
