"""What `exl info` prints on terminals of any width."""

from types import SimpleNamespace

import pytest


def summary(**changes: object) -> SimpleNamespace:
    from exl_runtime.model.summary import KindSummary, ModelSummary

    values = {"name": "model\x1b[31m", "path": "a/b", "architecture": "Fake", "format": "exl2", "parameters": 5_770_496}
    values |= {"bits_per_weight": 4.25, "file_bytes": 4_000_000, "weight_bytes": 3_000_000, "context_length": 1024}
    values |= {"context": 512, "cache_dtype": "fp32", "cache_bytes": 1 << 20, "working_bytes": 1 << 20}
    values |= {"total_bytes": 5 << 20, "free_bytes": 1 << 30}
    kind = KindSummary(kind="attention", matrices=24, weights=1_000_000, bits_per_weight=4.2, formats=("exl2",))
    return ModelSummary(kinds=(kind,), **(values | changes))


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
