"""Recommendations: against plain enumeration of the written rules, and on real folders against `exl info`."""

import argparse
import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest

from eval.commands import recommend as command
from eval.recommend import (
    Option,
    Variant,
    cache_bits,
    choose,
    default_caches,
    find_variants,
    group,
    longest_context,
    loss_of,
    with_measurements,
)
from eval.saved import FORMAT, read_measurements, read_reports
from exl_runtime.console.progress import QuietReporter
from exl_runtime.console.sizes import parse_size, size_text
from exl_runtime.errors import DataError, EvalError, UsageError
from exl_runtime.model.summary import KindSummary, ModelSummary, summarize

CACHES = ("fp16", "q8", "q6", "q4")
BYTES = {"fp32": 64, "fp16": 32, "bf16": 32, "q8": 17, "q6": 13, "q4": 9}  # of a token, made up


def summary(name: str, bits: float, size: int, context: int = 4096) -> ModelSummary:
    kinds = (KindSummary(kind="mlp", matrices=3, weights=1000, bits_per_weight=bits, formats=("exl2",)),)
    return ModelSummary(
        name=name, path=name, architecture="X", format="exl2", parameters=1000, bits_per_weight=bits, file_bytes=size,
        weight_bytes=size, kinds=kinds, context_length=context, context=context, cache_dtype="fp16", cache_bytes=0,
        working_bytes=0, total_bytes=size, free_bytes=0,
    )  # fmt: skip


def variant(name: str, bits: float, size: int, context: int = 4096, **kl: float) -> Variant:
    return Variant(folder=Path(name), summary=summary(name, bits, size, context), kl=kl)


def made_up_memory(variants: list[Variant]):
    sizes = {one.folder: one.summary.weight_bytes for one in variants}
    return lambda folder, context, cache: sizes[folder] + BYTES[cache] * (-(-context // 256) + 1) * 256


# --- the rules, spelled out once more ---------------------------------------------------------------------------------


def better(a: Option, b: Option) -> bool:
    """True when the rules of the docstring put `a` before `b`: pair by pair, without the ranks of the code."""
    if a.loss is not None:
        if a.loss != b.loss:
            return a.loss < b.loss
    else:
        bits = [round(option.variant.summary.bits_per_weight, 1) for option in (a, b)]
        held = [cache_bits(option.cache) for option in (a, b)]
        # q4 only before going below 3 bits: whoever keeps 3 bits with more than q4 wins over who needs q4 or less bits.
        fine = [bit >= 3 and hold >= 6 for bit, hold in zip(bits, held, strict=True)]
        if fine[0] != fine[1]:
            return fine[0]
        if not fine[0] and (bits[0] >= 3) != (bits[1] >= 3):
            return bits[0] >= 3
        if (bits[0] >= 4) != (bits[1] >= 4):  # q6 and q8 before going below 4
            return bits[0] >= 4
        level = [2 if hold >= 8 else 1 if hold >= 6 else 0 for hold in held]
        if level[0] != level[1]:
            return level[0] > level[1]
        exact = [option.variant.summary.bits_per_weight for option in (a, b)]
        if exact[0] != exact[1]:
            return exact[0] > exact[1]
    if cache_bits(a.cache) != cache_bits(b.cache):
        return cache_bits(a.cache) > cache_bits(b.cache)
    return (a.needed, a.variant.name) < (b.needed, b.variant.name)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_against_enumeration(seed: int, measured: bool) -> None:
    rng = random.Random(seed)
    variants = []
    for i in range(rng.randint(1, 7)):
        bits = rng.choice([2.2, 2.5, 2.97, 3.0, 3.5, 3.96, 4.0, 4.25, 5.0, 6.0, 8.0])
        kl = {"fp16": rng.choice([0.5, 0.1, 0.02, 0.02, 0.001])} if measured else {}
        variants.append(variant(f"v{i}", bits, int(bits * 12_000) + rng.randint(0, 900), **kl))
    context = rng.choice([1, 255, 256, 257, 1000, 4096])
    memory = made_up_memory(variants)
    budget = rng.randint(20_000, 250_000)
    choice = choose(variants, CACHES, budget=budget, context=context, memory=memory)

    extra = {"fp16": 0.0, "q8": 0.001, "q6": 0.003, "q4": 0.015}
    every = [
        Option(
            variant=one,
            cache=cache,
            needed=memory(one.folder, context, cache),
            loss=one.kl["fp16"] + extra[cache] if measured else None,
        )
        for one in variants
        for cache in CACHES
    ]
    fitting = [option for option in every if option.needed <= budget]
    assert {(o.variant.name, o.cache) for o in choice.fitting} == {(o.variant.name, o.cache) for o in fitting}
    assert choice.nearest.needed == min(option.needed for option in every)
    if not fitting:
        assert choice.best is None
        return
    assert choice.best is not None and choice.best.needed <= budget
    beaten = [o for o in fitting if better(o, choice.best)]
    assert not beaten, (choice.best, beaten)
    for one, other in zip(choice.fitting, choice.fitting[1:], strict=False):
        assert not better(other, one)
    longest = max(n for n in range(1, 4097) if memory(choice.best.variant.folder, n, choice.best.cache) <= budget)
    assert choice.longest == longest >= context


def test_q8_before_going_below_four_bits() -> None:
    variants = [variant("four", 3.97, 48_000), variant("three", 3.5, 42_000)]
    memory = made_up_memory(variants)
    pick = partial(choose, variants, CACHES, context=1024, memory=memory)
    needed = {(n, c): memory(Path(n), 1024, c) for n in ("four", "three") for c in CACHES}

    def chosen(budget: int) -> tuple[str, str]:
        best = pick(budget=budget).best
        assert best is not None
        return best.variant.name, best.cache

    assert needed["three", "fp16"] > needed["four", "q8"] > needed["four", "q6"]
    assert chosen(needed["four", "fp16"]) == ("four", "fp16")
    assert chosen(needed["four", "fp16"] - 1) == ("four", "q8")
    assert chosen(needed["four", "q8"] - 1) == ("four", "q6")
    assert chosen(needed["four", "q6"] - 1) != ("four", "q4"), "q4 only before going below 3 bits"
    assert chosen(needed["four", "q6"] - 1)[0] == "three"


def test_measured_divergence_beats_bits() -> None:
    variants = [variant("gptq", 4.25, 50_000, fp16=0.05), variant("best", 3.9, 50_000, fp16=0.02)]
    choice = choose(variants, CACHES, budget=10**6, context=512, memory=made_up_memory(variants))
    assert choice.measure == "kl" and choice.best is not None
    assert (choice.best.variant.name, choice.best.cache) == ("best", "fp16")


def test_a_cache_that_was_measured_counts_as_measured() -> None:
    assert loss_of({"fp16": 0.02, "q4": 0.3}, "q4", {"q4": 0.01}) == 0.3
    assert loss_of({"fp16": 0.02, "q4": 0.3}, "q8", {"q8": 0.001}) == pytest.approx(0.021)
    assert loss_of({"q8": 0.02}, "fp16", {"q8": 0.001}) == 0.02
    assert loss_of({"fp32": 0.02}, "q5", {"q8": 0.001, "q4": 0.015}) == pytest.approx(0.035)


def test_context_is_never_cut_and_never_beyond_the_model() -> None:
    variants = [variant("short", 8.0, 80_000, context=1000), variant("long", 4.0, 40_000, context=8192)]
    choice = choose(variants, CACHES, budget=10**6, context=2000, memory=made_up_memory(variants))
    assert choice.best is not None and choice.best.variant.name == "long" and choice.longest == 8192
    with pytest.raises(EvalError, match="made for 8192 tokens of context, 9000 were asked for"):
        choose(variants, CACHES, budget=10**6, context=9000, memory=made_up_memory(variants))
    short = Option(variant=variants[0], cache="fp16", needed=0, loss=None)
    assert longest_context(short, 10**6, made_up_memory(variants)) == 1000
    assert longest_context(short, 10, made_up_memory(variants)) == 0


def test_cache_types_are_taken_from_the_frame() -> None:
    assert default_caches(("auto", "fp32", "fp16", "bf16", "q8", "q6", "q4")) == CACHES
    assert [cache_bits(name) for name in ("fp32", "bf16", "q8")] == [32, 16, 8]
    with pytest.raises(UsageError):
        cache_bits("auto")


# --- real folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, demo: Path, ember: Path) -> Path:
    """Two variants of one model, something broken, and something that is no model."""
    (tmp_path / "quantized").symlink_to(demo)
    (tmp_path / "source").symlink_to(ember)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "notes").mkdir()
    return tmp_path


def run(*arguments: str):
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args(arguments), QuietReporter(program="eval"))


def copied(tmp_path: Path, demo: Path, ember: Path) -> Path:
    for name, source in (("quantized", demo), ("source", ember)):
        shutil.copytree(source, tmp_path / name)
    return tmp_path


def test_on_real_folders(models: Path, demo: Path, ember: Path) -> None:
    outcome = run(str(models), "--vram", "1GB", "--context", "1024", "--cache", "fp16")
    (choice,) = outcome.facts["choices"]
    best = choice["best"]
    assert best["path"] == str(ember.resolve()) and outcome.code == 0
    assert best["needed_bytes"] == summarize(ember, 1024, cache="fp16").total_bytes
    assert best["spare_bytes"] == 10**9 - best["needed_bytes"] and choice["longest_context"] == 1024
    assert [one["path"] for one in outcome.facts["skipped"]] == [str(models / "broken")]
    for part in ("take ", "why: ", "bits per weight of the layers", "rules:", "broken: ", "not considered"):
        assert part in outcome.text
    exact = best["needed_bytes"]
    same = run(str(models), "--vram", f"{exact / 1024}K", "--context", "1024", "--cache", "fp16")
    assert same.facts["choices"][0]["best"]["path"] == str(ember.resolve())
    less = run(str(models), "--vram", f"{(exact - 1) / 1024}K", "--context", "1024", "--cache", "fp16")
    other = less.facts["choices"][0]["best"]
    assert other["path"] == str(demo.resolve())
    assert other["needed_bytes"] == summarize(demo, 1024, cache="fp16").total_bytes < exact
    assert "the next better" in less.text


def test_nothing_fits(models: Path, demo: Path) -> None:
    least = summarize(demo, 256, cache="fp16").total_bytes
    outcome = run(str(models), "--vram", f"{least // 1024 + 1}K", "--context", "1024", "--cache", "fp16")
    (choice,) = outcome.facts["choices"]
    assert outcome.code == 2 and choice["best"] is None and choice["longest_context"] == 256
    assert choice["nearest"]["path"] == str(demo.resolve()) and choice["nearest"]["spare_bytes"] < 0
    assert "nothing fits" in outcome.text and "--context 256" in outcome.text
    hopeless = run(str(models), "--vram", "1MB", "--context", "1024")
    assert hopeless.facts["choices"][0]["longest_context"] == 0 and "a smaller model, is needed" in hopeless.text


def test_more_context_than_the_model_has(models: Path) -> None:
    with pytest.raises(EvalError, match="made for 1024 tokens of context, 16384 were asked for"):
        run(str(models), "--vram", "12GB", "--context", "16384")
    assert run(str(models), "--vram", "12GB").facts["choices"][0]["context"] == 1024


def test_a_single_model_and_no_model(demo: Path, tmp_path: Path) -> None:
    assert len(find_variants(demo)[0]) == 1
    with pytest.raises(EvalError, match="no usable model in it"):
        run(str(tmp_path), "--vram", "1GB")
    with pytest.raises(EvalError, match="cannot be read"):
        run(str(tmp_path / "absent"), "--vram", "1GB")


def test_different_models_are_chosen_apart(models: Path, tmp_path: Path) -> None:
    one, two = variant("a", 4.0, 1000), variant("b", 5.0, 1000)
    other = Variant(folder=Path("c"), summary=summary("c", 4.0, 1000, context=999), kl={})
    assert [[v.name for v in found] for found in group([one, other, two])] == [["a", "b"], ["c"]]


# --- saved measurements -----------------------------------------------------------------------------------------------


def saved(folder: Path, rows: list[dict[str, object]], **changes: object) -> Path:
    facts = {"format": FORMAT, "version": 1, "command": "compare", "protocol": "p", "reference": "s", "rows": rows}
    path = folder / "saved.jsonl"
    lines = [{"event": "stage"}, {"event": "done", **facts, **changes}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def saved_row(folder: Path, kl: float, **changes: object) -> dict[str, object]:
    return {
        "name": folder.resolve().name, "path": str(folder.resolve()), "cache": "fp16", "kl_mean": kl,
        "file_bytes": summarize(folder).file_bytes, **changes,
    }  # fmt: skip


def test_saved_measurement_decides(models: Path, demo: Path, ember: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, [saved_row(demo, 0.004), saved_row(ember, 0.9)])
    outcome = run(str(models), "--vram", "1GB", "--measurements", str(path))
    (choice,) = outcome.facts["choices"]
    assert (
        choice["measure"] == "kl" and choice["best"]["path"] == str(demo.resolve()) and choice["best"]["loss"] == 0.004
    )
    assert f"({path})" in outcome.text and "KL 0.00400" in outcome.text


def test_unquantized_weights_need_no_measurement(models: Path, demo: Path, ember: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, [saved_row(demo, 0.004)])
    choice = run(str(models), "--vram", "1GB", "--measurements", str(path)).facts["choices"][0]
    assert (
        choice["measure"] == "kl" and choice["best"]["path"] == str(ember.resolve()) and choice["best"]["loss"] == 0.0
    )


def test_measurement_of_other_files_does_not_count(models: Path, demo: Path, ember: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, [saved_row(demo, 0.004, file_bytes=5), saved_row(ember, 0.9)])
    outcome = run(str(models), "--vram", "1GB", "--measurements", str(path))
    assert outcome.facts["choices"][0]["measure"] == "bits"
    assert f"no measurement of {demo.resolve().name}, so bits per weight for all" in outcome.text


def test_rows_are_found_by_name_on_another_machine(demo: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, [saved_row(demo, 0.004, path="/elsewhere/demo"), saved_row(demo, 0.3, name="x", path="/y")])
    found = read_measurements(path)
    assert found.of(demo, summarize(demo).file_bytes) == {"fp16": 0.004}


def test_own_measurement_gives_the_cost_of_cache_types(demo: Path, tmp_path: Path) -> None:
    rows = [saved_row(demo, 0.0, cache="fp32"), saved_row(demo, 0.25, cache="q8")]
    own = read_measurements(saved(tmp_path, rows, command="cache", reference=None))
    assert own.own
    found = [(demo, summarize(demo))]
    variants, why, allowance = with_measurements(found, [own])
    assert allowance["q8"] == 0.25 and not variants[0].kl and "no saved measurement" in why


def test_conversion_reports_are_read(tmp_path: Path, demo: Path, ember: Path) -> None:
    root = copied(tmp_path, demo, ember)
    size = sum(path.stat().st_size for path in (root / "quantized").glob("*.safetensors"))
    entry = {"text": "held out", "tokens": 10, "kl_mean": 0.0123}
    report = {"format": "exl-runtime conversion report", "version": 1, "source": "/x/src", "divergence": [entry]}
    path = root / "quantized" / "report.json"
    path.write_text(json.dumps({**report, "bytes": size}))
    choice = run(str(root), "--vram", "1GB").facts["choices"][0]
    assert choice["measure"] == "kl" and "held out, 10 tokens, against src" in choice["why"]
    losses = {option["name"]: option["loss"] for option in choice["options"] if option["cache"] == "fp16"}
    assert losses == {"quantized": 0.0123, "source": 0.0}
    for damaged in (json.dumps({**report, "bytes": size + 1}), "{", "[1]", json.dumps({**report, "divergence": 3})):
        path.write_text(damaged)
        assert read_reports(root / "quantized") == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no comparison"),
        ("{}\nnot json\n", "holds no comparison"),
        (json.dumps({"format": FORMAT, "version": 9}), "of version 9, not 1"),
        (json.dumps({"format": FORMAT, "version": 1, "rows": [{"kl_mean": None}, 3]}), "holds no complete divergences"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_bad_measurements_are_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=problem) as caught:
        read_measurements(path)
    assert str(path) in caught.value.problem and "\n" not in caught.value.problem
    with pytest.raises(DataError, match="cannot be read"):
        read_measurements(tmp_path / "absent.json")


def test_sizes() -> None:
    sizes = {"12GB": 12 * 10**9, "12GiB": 12 * 2**30, "12G": 12 * 2**30, "11.5 gb": 11_500_000_000, ".5MB": 500_000}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("12", "", "GB", "-1GB", "1e3GB", "12Gi", "nanGB", "12 apples"):
        with pytest.raises(UsageError):
            parse_size(text)
    assert size_text(12 * 2**30) == "12.00 GiB" and size_text(12 * 10**9) == "12.00 GB"
    assert size_text(5 * 10**6, like=1) == "5.0 MB"
