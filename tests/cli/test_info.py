"""`exl info`: what it reads, and what it prints on terminals of any width."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from exl_runtime.cli import main


def exl(*arguments: str) -> int:
    return main.guarded(main.main, list(arguments))


def summary(**changes: object) -> SimpleNamespace:
    from exl_runtime.model.summary import KindSummary, ModelSummary

    values = {"name": "model\x1b[31m", "path": "a/b", "architecture": "Fake", "format": "exl2", "parameters": 5_770_496}
    values |= {"bits_per_weight": 4.25, "file_bytes": 4_000_000, "weight_bytes": 3_000_000, "context_length": 1024}
    values |= {"context": 512, "cache_dtype": "fp32", "cache_bytes": 1 << 20, "working_bytes": 1 << 20}
    values |= {"total_bytes": 5 << 20, "free_bytes": 1 << 30}
    kind = KindSummary(kind="attention", matrices=24, weights=1_000_000, bits_per_weight=4.2, formats=("exl2",))
    return ModelSummary(kinds=(kind,), **(values | changes))


def test_info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import exl_runtime.model.summary

    seen = []

    def look(folder: Path, context: int | None, *, cache: str) -> object:
        seen.append((folder, context, cache))
        return summary()

    monkeypatch.setattr(exl_runtime.model.summary, "summarize", look)
    assert exl("info", str(tmp_path), "--context", "512") == 0
    out = capsys.readouterr().out
    for word in ("model\\x1b[31m", "Fake", "4.25", "5,770,496", "attention", "4.20", "512 tokens", "fits", "5.0 MiB"):
        assert word in out
    assert "\x1b" not in out
    assert exl("info", str(tmp_path), "--json", "--cache", "k6v4") == 0
    assert json.loads(capsys.readouterr().out)["kinds"][0]["matrices"] == 24
    assert seen[0][1:] == (512, "auto") and seen[1][1:] == (None, "k6v4")
    assert exl("info", str(tmp_path), "--cache", "k6v9") == 2
    assert "'k6v9' is no cache type: use auto, fp32, fp16, bf16, q8, q6, q4, or kXvY" in capsys.readouterr().err
    assert exl("info", str(tmp_path / "absent")) == 2


@pytest.mark.parametrize("width", [100, 44, 39, 24, 16])
def test_info_cuts_no_number(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from exl_runtime.cli import info

    monkeypatch.setenv("COLUMNS", str(width))
    info.show(summary(weight_bytes=70 << 30))
    out = capsys.readouterr().out
    words = out.replace(",\n", " ").split()
    for number in ("24", "1,000,000", "4.20"):
        assert any(word.strip(",") == number for word in words), out
    assert "70.0 GiB" in " ".join(words) and "…" not in out
    assert max(map(len, out.splitlines())) <= width
