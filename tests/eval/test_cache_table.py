"""`cache`: one row per type, divergence from the exact cache, bytes from the model's own shape."""

import argparse
import json
from pathlib import Path

import pytest

from eval.commands import cache as command
from eval.opening import CACHES
from eval.saved import read_measurements
from exl_runtime.console.progress import QuietReporter


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("The cache holds what was said, and what was said decides what is said next.\n" * 30)
    return path


def run(text: Path, tmp_path: Path, *given: str):
    parser = argparse.ArgumentParser()
    command.add(parser)
    small = ("--data", str(text), "--rows", "2", "--threads", "1", "--reference-cache", str(tmp_path / "kept"))
    return command.run(parser.parse_args((*given, *small)), QuietReporter(program="eval"))


def test_every_known_type_against_the_exact_one(text: Path, tmp_path: Path, demo: Path) -> None:
    out = tmp_path / "cache.html"
    outcome = run(text, tmp_path, "demo", "--length", "96", "-o", str(out))
    rows = {row["cache"]: row for row in outcome.facts["rows"]}
    assert outcome.code == 0 and list(rows) == [name for name in CACHES if name != "auto"]
    assert rows["fp32"]["kl_mean"] < 1e-6, "the same model with the same cache"
    assert rows["fp16"]["kl_mean"] < rows["bf16"]["kl_mean"] < 1e-2
    assert all(row["perplexity"] == pytest.approx(rows["fp32"]["perplexity"], rel=0.1) for row in rows.values())
    config = json.loads((demo / "config.json").read_text())
    values = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert rows["fp32"]["cache_bytes_per_token"] == 4 * values
    assert rows["fp16"]["cache_bytes_per_token"] == rows["bf16"]["cache_bytes_per_token"] == 2 * values
    assert outcome.text.splitlines()[0].split()[0] == "cache"
    assert f"{4 * values}" in outcome.text and "the same model with the fp32 cache" in outcome.text
    assert outcome.facts["reference"] is None and read_measurements(out).own


def test_quantized_types_lose_more_the_fewer_their_bits(text: Path, tmp_path: Path) -> None:
    types = sorted((name for name in CACHES if name.startswith("q")), key=lambda name: -int(name[1:]))
    if not types:
        pytest.skip("this version has no quantized cache")
    outcome = run(text, tmp_path, "demo", "--length", "128", "--types", ",".join(["fp16", *types]), "--no-noise-floor")
    kls = [row["kl_mean"] for row in outcome.facts["rows"]]
    sizes = [row["cache_bytes_per_token"] for row in outcome.facts["rows"]]
    assert kls == sorted(kls) and sizes == sorted(sizes, reverse=True)
    assert outcome.facts["noise_floor"] is None


def test_against_a_source(text: Path, tmp_path: Path, ember: Path) -> None:
    given = ("demo", "--length", "64", "--types", "fp32", "--reference", str(ember), "--no-noise-floor")
    outcome = run(text, tmp_path, *given)
    (row,) = outcome.facts["rows"]
    assert row["kl_mean"] > 1e-3 and outcome.facts["reference"] == str(ember)


def test_windows_are_long_unless_told_otherwise(text: Path, tmp_path: Path, demo: Path) -> None:
    longer = tmp_path / "longer.txt"
    longer.write_text(text.read_text() * 2)
    outcome = run(longer, tmp_path, "demo", "--types", "fp16", "--rows", "1", "--no-noise-floor")
    own = json.loads((demo / "config.json").read_text())["max_position_embeddings"]
    assert own < command.LENGTH and f"windows of {own} tokens side by side" in outcome.text
