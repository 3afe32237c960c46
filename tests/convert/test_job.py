"""Whole conversions: what comes out, what becomes of a failure, and how much is held at a time."""

import gc
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exl2_rules
import pytest
from converting import Quiet, convert, in_a_hurry, interrupt, options, small_model, tensors, weights

from convert import job, measuring, verify
from convert.allocate import allocate
from convert.cli import main
from convert.job import resume, run
from convert.measure import GROUP_SIZES, Sensitivity
from convert.report import from_json
from convert.source import Source
from exl_runtime.errors import ConvertError


@pytest.fixture(scope="module", autouse=True)
def quick():
    with in_a_hurry():
        yield


@pytest.fixture(scope="module")
def done(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Quiet, Any]:
    """A finished conversion: its folder, what was said, its outcome."""
    out = tmp_path_factory.mktemp("done") / "out"
    progress = Quiet()
    return out, progress, run(options(small_model("llama", models), out), progress)


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_report_tells_what_the_files_hold(done) -> None:
    out, progress, outcome = done
    assert os.listdir(out.parent) == ["out"]  # no work folder any more
    report = from_json(json.loads((out / "report.json").read_text()))
    assert report.bytes == outcome.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    dense = exl2_rules.check(out)
    config = json.loads((out / "config.json").read_text())
    wanted = list(exl2_rules.linears(config))
    assert [matrix.path for matrix in report.matrices] == [path for path, *_ in wanted]
    stored = tensors(out)
    for matrix in report.matrices:
        bits = sum(8 * t.nbytes for name, t in stored.items() if name.startswith(f"{matrix.path}."))
        assert matrix.weights == dense[f"{matrix.path}.weight"].numel()
        assert matrix.bits_per_weight == pytest.approx(bits / matrix.weights)
        groups = stored[f"{matrix.path}.q_groups"][::2].tolist()
        assert all(f"{width}b_" in matrix.layout for width in groups) and 0 < matrix.error < 0.5
    layers = [matrix for matrix in report.matrices if matrix.path != "lm_head"]
    mean = sum(m.bits_per_weight * m.weights for m in layers) / sum(m.weights for m in layers)
    assert report.bits_stored == outcome.bits_stored == pytest.approx(mean)
    assert report.bits_target == config["quantization_config"]["bits"] == 5.5 and report.head_bits == 6
    (divergence,) = report.divergence
    assert divergence.tokens == 4 * 32 and 0 < divergence.kl_mean < 0.2 and outcome.divergence == report.divergence
    assert "8 rows of 32 tokens: 7 sampled" in report.calibration
    assert config["quantization_config"]["calibration"] == {
        "rows": 8,
        "length": 32,
        "dataset": "(sampled from the source model)",
    }
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert f"{report.bits_stored:.3f}" in text and "down" in text and str(report.bytes) in text
    assert "3.273 to 9.939 bits per weight can be reached" in progress.said[0]


def test_the_same_job_gives_the_same_files_and_another_seed_others(done, models: Path, tmp_path: Path) -> None:
    source = small_model("llama", models)
    convert(options(source, tmp_path / "a", work=tmp_path / "w"))
    convert(options(source, tmp_path / "b", seed=1))
    assert weights(tmp_path / "a") == weights(done[0]) != weights(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("encoder", ["best", "classic"])
def test_a_measurement_of_one_job_serves_another(encoder: str, models: Path, tmp_path: Path) -> None:
    source = small_model("llama", models)
    given = {"encoder": encoder, "work": tmp_path / "w"}
    measured = convert(options(source, None, bits=None, measure_only=True, **given))
    assert measured.folder is None and measured.measurement == tmp_path / "w" / "measurement.json"
    assert convert(options(source, None, bits=None, measure_only=True, **given)).measurement.exists()
    convert(options(source, tmp_path / "a", encoder=encoder, measurement=measured.measurement))
    convert(options(source, tmp_path / "b", encoder=encoder))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    # The job has a copy: once it goes on, the file may be gone.
    job_c = options(source, tmp_path / "c", encoder=encoder, measurement=measured.measurement)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "encode_layers", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(job_c)
    measured.measurement.unlink()
    convert(job_c)
    assert weights(tmp_path / "c") == weights(tmp_path / "b")


def invented(source: Source) -> list[Sensitivity]:
    """Losses for every matrix of a model: as much as an error of its width does, and some matrices count more."""
    made = []
    for layer in source.spec.layers:
        for number, slot in enumerate(source.slots(layer.index)):
            fall = [0.9**block for block in range(slot.inputs // 32)]
            losses = {
                (bits, size): tuple((1 + number) * 4.0**-bits * size**0.1 * x for x in fall)
                for bits, sizes in GROUP_SIZES.items()
                for size in sizes
            }
            about = {"inputs": slot.inputs, "outputs": slot.outputs, "biased": slot.biased}
            made.append(Sensitivity(path=slot.path, losses=losses, **about))
    return made


def test_the_bits_land_below_the_target(ember: Path, tmp_path: Path) -> None:
    """A model of millions of weights: within a hundredth, over the whole ladder; and so do the bytes on the disk."""
    with Source.open(ember) as source:
        items = invented(source)
        for target in (2.25, 2.5, 3.0, 3.5, 4.0, 4.25, 5.0, 6.0, 7.0, 8.0):
            chosen = allocate(items, target)
            assert target - 0.01 < chosen.bits_per_weight <= target
        record = {"format": measuring.FORMAT, "version": measuring.VERSION, "encoder": "best"}
        record |= {"model": source.identity(), "entries": {item.path: item.to_json() for item in items}}
    (tmp_path / "m.json").write_text(json.dumps(record))
    wanted = options(ember, tmp_path / "out", bits=3.5, rows=4, measurement=tmp_path / "m.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "SANE", 100.0)  # this is no measurement
        found = convert(wanted)
    assert found.bits_stored == exl2_rules.stored_bits(tmp_path / "out") / sum(i.inputs * i.outputs for i in items)
    assert 3.49 < found.bits_stored <= 3.5


def test_bits_for_a_given_memory(models: Path, tmp_path: Path) -> None:
    progress = Quiet()
    source = small_model("llama", models)
    found = run(options(source, tmp_path / "out", bits=None, target_vram=1_100_000, context=64), progress)
    (said,) = [text for text in progress.said if "to work in" in text]
    assert f"{found.bits_target:.3f} bits per weight" in said
    assert found.bits_target - 0.3 < found.bits_stored <= found.bits_target
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == found.bits_target
    )


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_result_that_does_not_work_is_never_published(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Quiet()
    with monkeypatch.context() as patch:
        patch.setattr(verify, "SANE", 0.0)
        with pytest.raises(ConvertError, match="does not work"):
            run(options(source, source.parent / "out"), progress)
    assert sorted(os.listdir(source.parent)) == ["out.work", "source"]
    assert str(source.parent / "out.work") in progress.warned[-1]
    progress = Quiet()
    resume(source.parent / "out.work", progress)
    assert "measuring widths" not in progress.stages and "encoding" not in progress.stages
    assert sorted(os.listdir(source.parent)) == ["out", "source"]


def test_the_command_names_the_work_that_is_kept(source: Path, monkeypatch, capsys) -> None:
    out = source.parent / "out"
    argv = ["-i", str(source), "-o", str(out), "-b", "5.5", "--rows", "8", "--length", "32", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(verify, "SANE", 0.0)
        assert main(argv) == 2
    told = capsys.readouterr()
    assert f"{out}.work" in told.err and "does not work" in told.err and "Traceback" not in told.err
    assert main(argv) == 0
    assert str(out) in capsys.readouterr().out


# --- memory ----------------------------------------------------------------------------------------------------------


def test_one_layer_at_a_time(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of one layer, and no table or head, are alive when those of another are read."""
    alive: list[tuple[str, Any]] = []
    real = {name: getattr(Source, name) for name in ("layer", "embedding", "head")}

    def tracked(name: str) -> Callable[..., Any]:
        def read(self: Source, *args: Any) -> Any:
            held = {what for what, reference in alive if reference() is not None}
            if held:
                gc.collect()
                held = {what for what, reference in alive if reference() is not None}
            held -= {f"head() of {source.name}"} if name == "head" else set()  # in the end both heads are compared
            assert not held, f"{held} alive when {name}{args} of {self.folder.name} is read"
            found = real[name](self, *args)
            for tensor in found.values() if isinstance(found, dict) else [found]:
                if tensor.dim() > 1:
                    alive.append((f"{name}{args} of {self.folder.name}", weakref.ref(tensor)))
            return found

        return read

    for name in real:
        monkeypatch.setattr(Source, name, tracked(name))
    monkeypatch.setattr(
        job.tuning, "tuned_files", lambda source, space, *a, **k: ([space.layer(i) for i in (0, 1, None)], "")
    )
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, range(33, 90))) * 100)
    for name, encoder in (("llama", "best"), ("llama", "classic"), ("mixtral", "best")):
        source = small_model(name, models)
        convert(options(source, tmp_path / f"{name}-{encoder}", calibration=(text,), encoder=encoder))
    assert len(alive) > 100
